"""Every policy has a card, and the card's table of settings says what the code says."""

import re
from pathlib import Path

import pytest

from headway.core.batch.contract import batch_policies
from headway.core.cluster import cluster_policies

CARDS = Path(__file__).parents[1] / "docs" / "policies"
POLICIES = [(registry, name) for registry in (cluster_policies, batch_policies) for name in registry.names()]


def card_of(what: str, name: str) -> Path:
    batch = CARDS / f"{name}-batch.md"
    return batch if what == "batch policy" and batch.exists() else CARDS / f"{name}.md"


@pytest.mark.parametrize(("registry", "name"), POLICIES, ids=[f"{r.what}-{n}" for r, n in POLICIES])
def test_the_card_has_every_setting_with_its_default(registry, name) -> None:
    text = card_of(registry.what, name).read_text()
    cls, _ = registry.find(name)
    shown = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, flags=re.MULTILINE))
    for doc in cls.Settings.docs():
        default = f"{doc.default:g}" if isinstance(doc.default, float | int) else doc.default
        if (
            doc.name in cls.Settings.__annotations__ or doc.name in shown
        ):  # else it stands on its parent's card
            assert shown[doc.name].strip("`") == default, doc.name
