"""``/models``: the cards of fine-tuned models."""

from __future__ import annotations

import json
import re

from fastapi import APIRouter
from meddiff.contracts.models import ModelCard, ModelList
from meddiff.contracts.problems import ProblemError
from meddiff.planning.removal import readable_cards, remove_model
from meddiff.store.keys import ModelKeys, model_name
from meddiff.store.objects import NotFound
from pydantic import ValidationError

from meddiff_services.gateway.access import Here
from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.pages import Cursor, Derived, Limit, page, shown_last
from meddiff_services.gateway.problems import documented

router = APIRouter(tags=["models"], responses=documented("unauthenticated", "forbidden"))

_MODEL_ID = re.compile(r"^md_[0-9a-f]{32}$")


def find_model(here: Backends, model: str) -> ModelCard | None:
    """The model of that id, or the one that bears the name: that of the latest fine-tune of it. Raises
    ``ValidationError`` for a card of another version."""
    try:
        if not _MODEL_ID.match(model):
            model = json.loads(here.store.get(model_name(here.tenant, model)))["model_id"]
        return here.store.get_json(ModelKeys(here.tenant, model).card, ModelCard)
    except ValidationError:
        raise
    except (NotFound, ValueError):
        return None


@router.get("/models")
def list_models(here: Here, cursor: Cursor = None, limit: Limit = 100) -> ModelList:
    """Models, newest first."""
    last = shown_last(cursor)
    newest_first = sorted(readable_cards(here.store, here.tenant), key=_age, reverse=True)
    rest = (card for card in newest_first if last is None or _age(card) < last)
    models, following = page(rest, limit, _age)
    return ModelList(models=models, next=following)


@router.get("/models/{model}", responses=documented("not-found"))
def get_model(model: str, here: Here) -> ModelCard:
    """The card of a model, by its id or its name."""
    card = find_model(here, model)
    if card is None:
        raise ProblemError("not-found", "There is no model of that id or name")
    return card


@router.delete("/models/{model}", status_code=204, responses=documented("not-found", "conflict"))
def delete_model(model: str, here: Here, derived: Derived = False) -> None:
    """Remove a model. What holds it is named in a 409: jobs that go on, and pairs and reports made with it, which go
    with it where ``derived`` is asked for."""
    remove_model(here.store, here.tenant, get_model(model, here), derived=derived)


def _age(card: ModelCard) -> str:
    return f"{card.created_at.isoformat()} {card.id}"
