"""However many files the server moved and wherever we were killed, one complete delivery is somewhere, and nothing that exists
once only is overwritten or given up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ncr_upload.domain.publishing import (
    Listing,
    Move,
    Place,
    PublishRecord,
    find_strangers,
    is_decided,
    is_exactly,
    plan_settlement,
)

Content = tuple[str, int]
"""Whose file it is, and how many bytes are there."""
PATHS = ("S/a", "S/b", "S/c", "S/d/e")
SIZES = st.dictionaries(st.sampled_from(PATHS), st.integers(1, 3), min_size=1)
DELETES = ("each", "at the end", "never")


@dataclass
class Disk:
    """The server's, as it really is. A half copied file has fewer bytes than its source."""

    places: dict[Place, dict[str, Content]]
    new: dict[str, int]
    old: dict[str, int]
    spared: list[Content] = field(default_factory=list)

    def listing(self) -> Listing:
        sizes = {place: {path: size for path, (_, size) in found.items()} for place, found in self.places.items()}
        return Listing(sizes[Place.PACKAGE], sizes[Place.FINAL], sizes[Place.ASIDE])

    def rename_folder(self, old: Place, new: Place, *, stops_after: int, deletes: str, half: bool) -> bool:
        """As a server does that copies; whether it came to its end."""
        source, target = self.places[old], self.places[new]
        paths = sorted(source)
        for count, path in enumerate(paths):
            if count == stops_after:
                owner, size = source[path]
                if half:
                    target[path] = (owner, size - 1)
                return False
            target[path] = source[path]
            if deletes == "each":
                del source[path]
        if deletes == "at the end":
            for count, path in enumerate(paths):
                if len(paths) + count == stops_after:
                    return False
                del source[path]
        return True

    def carry_out(self, move: Move) -> None:
        source = self.places[move.old]
        if move.new is Place.SPARE:
            self.spared.append(source.pop(move.path))
            return
        assert move.path not in self.places[move.new], f"{move} overwrites a file"
        self.places[move.new][move.path] = source.pop(move.path)

    def has(self, owner: str, sizes: dict[str, int], *places: Place) -> bool:
        return all(any(self.places[place].get(path) == (owner, size) for place in places) for path, size in sizes.items())

    def assert_nothing_lost(self) -> None:
        assert self.has("new", self.new, Place.PACKAGE, Place.FINAL)
        assert self.has("old", self.old, Place.ASIDE, Place.FINAL)


def settle(disk: Disk, record: PublishRecord, crashes: Iterator[int], *, may_finish: bool) -> bool:
    """Plan, and carry it out up to a crash; again and again. Whether the package is published in the end."""
    for _ in range(40):
        plan = plan_settlement(record, disk.listing(), may_finish=may_finish)
        if not plan.moves:
            assert not plan.missing or plan.published
            return plan.published
        for move in plan.moves[: next(crashes)]:
            disk.carry_out(move)
            disk.assert_nothing_lost()
    raise AssertionError("it never ends")


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    new=SIZES,
    old=st.one_of(st.just({}), SIZES),
    aside_stops=st.integers(0, 9),
    package_stops=st.integers(0, 9),
    deletes=st.sampled_from(DELETES),
    half=st.booleans(),
    may_finish=st.booleans(),
    crashes=st.lists(st.integers(1, 5), min_size=40, max_size=40),
)
def test_a_broken_publish_ends_whole_one_way_or_the_other(
    new: dict[str, int],
    old: dict[str, int],
    aside_stops: int,
    package_stops: int,
    deletes: str,
    half: bool,
    may_finish: bool,
    crashes: list[int],
) -> None:
    places: dict[Place, dict[str, Content]] = {place: {} for place in (Place.PACKAGE, Place.FINAL, Place.ASIDE)}
    places[Place.PACKAGE] = {path: ("new", size) for path, size in new.items()}
    places[Place.FINAL] = {path: ("old", size) for path, size in old.items()}
    disk = Disk(places, new, old)
    record = PublishRecord("job", new, old)
    went = disk.rename_folder(Place.FINAL, Place.ASIDE, stops_after=aside_stops, deletes=deletes, half=half)
    if went:  # where the source was left, the server merges the two
        disk.rename_folder(Place.PACKAGE, Place.FINAL, stops_after=package_stops, deletes=deletes, half=half)
    disk.assert_nothing_lost()
    published = settle(disk, record, iter(crashes), may_finish=may_finish)
    final = disk.places[Place.FINAL]
    if published:
        assert {path: content for path, content in final.items() if content[0] == "new"}.keys() == new.keys()
        assert not may_finish or final == {path: ("new", size) for path, size in new.items()}
    else:
        assert final == {path: ("old", size) for path, size in old.items()}
        assert disk.has("new", new, Place.PACKAGE), "the package is staged as before"


def test_states_between_two_whole_renames_are_decided_at_once() -> None:
    new, old = {"S/a": 1, "S/b": 2}, {"S/a": 3}
    record = PublishRecord("job", new, old)
    untouched, aside, done = Listing(new, old, {}), Listing(new, {}, old), Listing({}, new, old)
    assert all(is_decided(record, seen) for seen in (untouched, aside, done))
    assert [plan_settlement(record, seen, may_finish=True).published for seen in (untouched, aside, done)] == [
        False,
        False,
        True,
    ]
    for broken in (Listing(new, {"S/a": 1}, old), Listing({"S/b": 2}, {"S/a": 1}, old), Listing(new, old, {"S/a": 3})):
        assert not is_decided(record, broken)


def test_a_folder_of_somebody_else_is_neither_a_delivery_nor_touched() -> None:
    record = PublishRecord("job", {"S/a": 1}, {})
    squatted = Listing({"S/a": 1}, {"foreign.txt": 8}, {})
    assert plan_settlement(record, squatted, may_finish=True) == plan_settlement(record, squatted, may_finish=False)
    assert plan_settlement(record, squatted, may_finish=True).moves == ()
    assert list(find_strangers(record, squatted)) == ["foreign.txt"]


def test_what_was_merged_into_the_delivery_is_moved_aside_and_not_removed() -> None:
    record = PublishRecord("job", {"S/a": 1}, {})
    plan = plan_settlement(record, Listing({}, {"S/a": 1, "foreign.txt": 8}, {}), may_finish=True)
    assert (plan.published, plan.moves) == (True, (Move("foreign.txt", Place.FINAL, Place.ASIDE),))


def test_a_file_of_another_size_is_no_delivery() -> None:
    record = PublishRecord("job", {"S/a": 2}, {"S/a": 5})
    plan = plan_settlement(record, Listing({}, {"S/a": 1}, {"S/a": 5}), may_finish=True)
    assert not plan.published
    assert Move("S/a", Place.ASIDE, Place.FINAL) in plan.moves


def test_a_record_of_a_release_before_knows_no_sizes() -> None:
    record = PublishRecord("job", {"S/a": None}, None)
    assert plan_settlement(record, Listing({}, {"S/a": 7}, {"S/a": 5}), may_finish=True).published
    assert not is_exactly({}, record.files)
