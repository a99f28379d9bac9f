"""How much synthetic pairs are worth: segmenters, the figures of a case, and what a difference between arms means."""
