"""``/models``: the cards of fine-tuned models."""

from __future__ import annotations

import json
import re

from fastapi import APIRouter
from meddiff.contracts.models import ModelCard, ModelList
from meddiff.contracts.problems import ProblemError
from meddiff.store.keys import ModelKeys, model_name, tenant_root
from meddiff.store.objects import NotFound

from meddiff_services.gateway.backends import Backends, Here
from meddiff_services.gateway.problems import documented

router = APIRouter(tags=["models"])

_MODEL_ID = re.compile(r"^md_[0-9a-f]{32}$")


def find_model(here: Backends, model: str) -> ModelCard | None:
    """The model of that id, or the newest of that name."""
    try:
        if not _MODEL_ID.match(model):
            model = json.loads(here.store.get(model_name(here.tenant, model)))["model_id"]
        return here.store.get_json(ModelKeys(here.tenant, model).card, ModelCard)
    except (NotFound, ValueError):
        return None


@router.get("/models")
def list_models(here: Here) -> ModelList:
    """Every model, newest first."""
    found = [find_model(here, model_id) for model_id in here.store.children(tenant_root(here.tenant, "models"))]
    cards = [card for card in found if card is not None]
    return ModelList(models=tuple(sorted(cards, key=lambda card: (card.created_at, card.id), reverse=True)))


@router.get("/models/{model}", responses=documented("not-found"))
def get_model(model: str, here: Here) -> ModelCard:
    """The card of a model, by its id or its name."""
    card = find_model(here, model)
    if card is None:
        raise ProblemError("not-found", "There is no model of that id or name")
    return card
