"""Who is served next: lanes, callers in turn, batches of one group."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from service.waiting import PATIENCE, Lane, Waiting


@dataclass(frozen=True)
class Item:
    caller: str = "a"
    lane: Lane = Lane.interactive
    group: str = "image"
    number: int = 0
    weight: int = 1


def room(*items: Item) -> Waiting[Item]:
    waiting: Waiting[Item] = Waiting()
    for item in items:
        waiting.put(item)
    return waiting


def test_empty():
    assert room().take(8) == [] and len(room()) == 0


def test_first_come_first_served_within_a_caller():
    items = [Item(number=i) for i in range(5)]
    waiting = room(*items)
    assert waiting.take(3) == items[:3]
    assert waiting.take(3) == items[3:] and len(waiting) == 0


def test_a_batch_is_of_one_group_and_groups_take_turns():
    waiting = room(*[Item(number=i, group=("image", "spectrum")[i % 2]) for i in range(12)])
    groups = []
    while batch := waiting.take(3):
        assert len({item.group for item in batch}) == 1
        groups.append(batch[0].group)
    assert groups == ["image", "spectrum", "image", "spectrum"]


def test_callers_share_a_batch_equally_whoever_sent_more():
    waiting = room(*[Item("greedy", number=i) for i in range(100)], *[Item("modest", number=i) for i in range(6)])
    assert Counter(item.caller for item in waiting.take(8)) == {"greedy": 4, "modest": 4}
    assert Counter(item.caller for item in waiting.take(8)) == {"greedy": 6, "modest": 2}


def test_turns_hold_over_groups_too():
    """A caller with work of many kinds does not get a turn for each of them."""
    greedy = [Item("greedy", group=f"kind {i}") for i in range(20)]
    waiting = room(*greedy, Item("modest", group="other"))
    waiting.take(4)
    assert waiting.take(4)[0].caller == "modest"


def test_who_leaves_gives_up_his_place():
    mine = [Item(number=i, weight=2) for i in range(4)]
    waiting = room(*mine, Item("other", number=9))
    waiting.remove(mine[1:3])
    assert len(waiting) == 5 and waiting.ahead(Lane.interactive, "a") == 5
    waiting.remove(mine[1:3])  # they have left already
    waiting.remove([mine[0], mine[3]])
    assert len(waiting) == 1 and waiting.ahead(Lane.interactive, "a") == 1
    waiting.remove(mine)  # none is left of this caller
    assert waiting.take(8) == [Item("other", number=9)] and waiting.take(8) == []


def test_urgent_lanes_go_first_and_the_patient_fill_up():
    patient = [Item("job", Lane.patient, number=i) for i in range(10)]
    waiting = room(*patient, Item("person"), Item("check", Lane.health))
    batch = waiting.take(4)
    assert [item.caller for item in batch] == ["check", "person", "job", "job"]


def test_the_patient_never_starve():
    waiting = room(*[Item("job", Lane.patient, "spectrum") for _ in range(3)], *[Item("person") for _ in range(100)])
    served = [waiting.take(2)[0].lane for _ in range(PATIENCE)]
    assert served == [Lane.interactive] * (PATIENCE - 1) + [Lane.patient]


@pytest.mark.parametrize(
    ("caller", "lane", "ahead"),
    [
        ("greedy", Lane.interactive, 43),  # all of them
        ("modest", Lane.interactive, 3 + 4),  # its own 3, and as many turns and one more of the other
        ("new", Lane.interactive, 2),  # one turn of each other
        ("new", Lane.health, 0),
        ("new", Lane.patient, 43),
    ],
)
def test_how_many_come_before(caller, lane, ahead):
    waiting = room(*[Item("greedy") for _ in range(40)], *[Item("modest") for _ in range(3)])
    assert waiting.ahead(lane, caller) == ahead


def test_a_heavy_item_counts_for_its_weight():
    waiting = room(Item("heavy", weight=30), Item("light"))
    assert len(waiting) == 31 and waiting.ahead(Lane.interactive, "light") == 3
    assert waiting.ahead(Lane.interactive, "heavy") == 31
    assert len(waiting.take(1)) == 1 and len(waiting) == 1
    waiting.take(1)
    assert len(waiting) == 0 and waiting.ahead(Lane.interactive, "heavy") == 0


def test_the_turn_to_choose_a_group_goes_round_where_whole_rounds_are_served():
    """Else the caller who comes first stays so, and other groups wait as long as his and another's backlog last."""
    backlog = [Item(name, number=n) for n in range(100) for name in ("first", "second")]
    waiting = room(*backlog, Item("second", group="spectrum"))
    assert "spectrum" in [waiting.take(8)[0].group for _ in range(4)]


def test_turns_are_turns_also_where_more_callers_wait_than_a_batch_holds():
    """A new one is served after one item of each other, not when all before it have nothing left."""
    waiting = room(*[Item(f"old {i}", number=n) for i in range(12) for n in range(20)], Item("new"))
    batches = [waiting.take(4) for _ in range(4)]
    assert [item.caller for item in batches[3]].count("new") == 1
    assert max(Counter(item.caller for batch in batches[:3] for item in batch).values()) == 1
