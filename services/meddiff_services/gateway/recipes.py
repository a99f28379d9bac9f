"""``/recipes``: the named recipes with every value."""

from __future__ import annotations

from fastapi import APIRouter
from meddiff.contracts.recipes import RECIPES, Recipe

router = APIRouter(tags=["recipes"])


@router.get("/recipes")
def list_recipes() -> dict[str, Recipe]:
    """Every named recipe; a request overrides values of one of them."""
    return RECIPES
