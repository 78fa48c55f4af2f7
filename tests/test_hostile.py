"""Hostile inputs of all public functions: each gets the right answer, or an error that names the argument.

As a script it prints the counts: `python tests/test_hostile.py`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence

import hostile_inputs as whole
import hostile_parts as parts
import jaxtyping
import pytest
from hostile_inputs import Case

GROUPS: Sequence[Callable[[], Iterator[Case]]] = (
    whole.cases_of_data,
    whole.cases_of_train,
    whole.cases_of_evaluate,
    whole.cases_of_constraints,
    whole.cases_of_problems,
    whole.cases_of_projection,
    parts.cases_of_numbers,
    parts.cases_of_sets,
    parts.cases_of_losses,
    parts.cases_of_rules,
    parts.cases_of_datasets,
    parts.cases_of_compare,
    parts.cases_of_flax,
    parts.cases_that_are_right,
)


def outcome(case: Case) -> tuple[str, str]:
    """Of one call: "clear", "right", "unclear" or "wrong", and what happened."""
    try:
        answer = case.call()
    except (ValueError, TypeError, FileNotFoundError) as error:
        said = f"{type(error).__name__}: {error}"
        if case.argument is None:
            return "wrong", said
        named = case.argument if case.argument.startswith("--") else f"`{case.argument}"
        is_clear = named in str(error) and case.says_what_it_got(" ".join(str(error).split()))
        return ("clear" if is_clear else "unclear"), said
    except Exception as error:  # every other one is a finding
        return "wrong", f"{type(error).__name__}: {error}"
    if case.holds is None:
        return "wrong", f"it answered {type(answer).__name__}"
    return ("right" if bool(case.holds(answer)) else "wrong"), "it answered"


def tried(group: Callable[[], Iterator[Case]]) -> list[tuple[str, str, str]]:
    return [(case.name, *outcome(case)) for case in group()]


@pytest.fixture
def untyped():
    """The library as users have it, without the check of annotated types that these tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_hostile_inputs_get_a_right_answer_or_a_clear_error(group, untyped, registry):
    found = tried(group)
    assert found
    bad = [f"{kind}: {name}: {said[:300]}" for name, kind, said in found if kind in ("wrong", "unclear")]
    assert not bad, "\n".join(bad)


def test_there_are_many():
    assert sum(len(list(group())) for group in GROUPS) >= 300


if __name__ == "__main__":
    results = [found for group in GROUPS for found in tried(group)]
    for name, kind, said in results:
        if kind in ("wrong", "unclear"):
            print(f"{kind}: {name}: {said[:300]}")
    counts = collections.Counter(kind for _, kind, _ in results)
    print(f"{len(results)} tried:", ", ".join(f"{counts[k]} {k}" for k in ("clear", "right", "unclear", "wrong")))
