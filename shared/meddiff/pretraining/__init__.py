"""How the built-in foundation was made: `python -m meddiff.pretraining`, see docs/foundation.md."""
