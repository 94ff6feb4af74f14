"""Owning the staging folders of a task, publishing from one, and ending a publish that broke off.

    {base}/.ncr-staging/{task_id}-{fence}/package/{sku}/…    becomes {base}/{job_id}
                                          previous/{job_id}  the delivery it replaces, once renamed aside
                                          parts/             files while they arrive, by the SHA-256 they will have
                                          manifest.json      target → SHA-256 of what `package` has, or is about to have
                                          publish.json       what a publish was about to do; gone once it is undone
                                          spare/             copies that a server left in the way of another file

The folder's name is the fence. A newer attempt renames the folder to its own name, and from then on no path that the
older attempt holds exists. A folder is made complete under `….new` and removed as `….gone`.

A rename of a folder is believed only when a listing shows what it came to: servers that copy file by file break off, go on
after the time-out, or leave the source. What was refused or not answered is listed until two listings agree, and then ended
file by file or undone (`domain/publishing.py` decides which). Nothing leaves `previous` otherwise than to its final name until
the new package has been listed complete there.
"""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import asyncssh

from ncr_upload.adapters.sftp_dropoff.channels import Channels
from ncr_upload.adapters.sftp_dropoff.manifest import Manifest
from ncr_upload.adapters.sftp_dropoff.package import check_relative, list_parents
from ncr_upload.adapters.sftp_dropoff.remote import MAX_REQUESTS, Denied, Failed, Missing, Seen, Tree, at_most, escaped
from ncr_upload.adapters.sftp_dropoff.scratch import STAGING
from ncr_upload.application.ports import AnnouncedPublish, Successor
from ncr_upload.domain.errors import DeliveryError, DestinationParked, LeaseLost, NotPublished, PublishUnsettled, Unavailable
from ncr_upload.domain.publishing import (
    Expected,
    Listing,
    Move,
    Place,
    PublishRecord,
    Settlement,
    Sizes,
    find_strangers,
    holds,
    is_decided,
    is_exactly,
    plan_settlement,
)

RECORD = "publish.json"
PARTS_OF_FOLDER = ("package", "previous", "parts")
FOLDER = re.compile(r"(?P<task>[!-~]+)-(?P<fence>[0-9]{1,18})(?P<state>\.new|\.gone)?")
STILL_SECONDS = 3.0
"""Two listings so far apart that agree show that nothing moves any more."""

MOST_WAIT_SECONDS = 900.0
"""How long a rename that still moves files is waited for, as long as the lease is kept."""

TURNS = 6


@dataclass(frozen=True, slots=True)
class _Settled:
    """How a publish ended, by how many moves, which files of the previous delivery were nowhere, and whether a rename had
    broken off."""

    published: bool
    moves: int
    missing: tuple[str, ...]
    broke_off: bool = False


@dataclass(frozen=True, slots=True)
class _Spots:
    """Where the folders of one publish are."""

    own: str
    final: str
    aside: str
    spare: str

    @property
    def package(self) -> str:
        return posixpath.join(self.own, "package")

    def of(self, place: Place) -> str:
        return {
            Place.PACKAGE: self.package,
            Place.FINAL: self.final,
            Place.ASIDE: self.aside,
            Place.SPARE: self.spare,
        }[place]


Trees = tuple[Tree, Tree, Tree]
"""The package, what has the final name, and what is set aside."""


class Publisher:
    """The staging folders below one base folder, as one session sees them."""

    def __init__(self, channels: Channels, base: str) -> None:
        self._channels = channels
        self._remote = channels.first
        self._base = base
        self._fresh: set[str] = set()  # folders that this session has made, and staged nothing into
        self._staged: dict[str, tuple[Sizes, Sizes | None]] = {}
        self._still: Trees | None = None  # what was seen to stand still before a folder was taken over
        self._published: set[str] = set()  # folders whose package this session has listed under its final name

    def path(self, name: str) -> str:
        return posixpath.join(self._base, STAGING, name)

    async def list_folders(self, make: bool = False) -> dict[str, asyncssh.SFTPAttrs]:
        staging = posixpath.join(self._base, STAGING)
        try:
            return await self._remote.entries(staging)
        except Missing:
            if make:
                await self._remote.make_folders(staging)
            return {}

    # --- ownership ----------------------------------------------------------------------------------------------

    def take_fresh(self, name: str) -> bool:
        """Return whether this session has made the folder and nothing was staged there yet."""
        fresh = name in self._fresh
        self._fresh.discard(name)
        return fresh

    async def adopt(self, task_id: str, fence: int, announced: AnnouncedPublish | None) -> str:
        """Own the folder of this fence, with what older ones hold. Return a remark for the history, or nothing."""
        name = name_folder(task_id, fence)
        for _ in range(TURNS):
            staged = await self.list_folders(make=True)
            fences = _fences(task_id, staged)
            if any(other > fence for other in fences):
                if fence in fences:
                    with suppress(Unavailable):
                        await self.remove([name], Successor.UNKNOWN)
                raise LeaseLost(task_id, fence)
            older = sorted(other for other in fences if other < fence)
            if fence in fences and not older:
                return "" if name in self._fresh else await self._settle_taken(name, announced)
            if fence in fences:
                for each in older:
                    await self._merge(self.path(name_folder(task_id, each)), self.path(name))
                    await self.remove([name_folder(task_id, each)], Successor.UNKNOWN)
            elif older:
                await self._take_over(name_folder(task_id, older[-1]), name, announced)
            else:
                await self._make(name, staged)
        raise Unavailable(
            "staging_contended",
            f"{self._remote.address}: {self.path(name)} could not be taken over in {TURNS} turns",
            "It is tried again.",
        )

    async def _make(self, name: str, staged: Iterable[str]) -> None:
        own = self.path(name)
        new = own + ".new"
        if f"{name}.new" in staged:
            await self._remote.remove_tree(new)
        await self._remote.make_folder(new)
        await asyncio.gather(*(self._remote.make_folder(posixpath.join(new, folder)) for folder in PARTS_OF_FOLDER))
        await self._remote.rename(new, own)
        self._fresh.add(name)

    async def _take_over(self, older: str, name: str, announced: AnnouncedPublish | None) -> None:
        """Rename an older fence's folder, but not while a rename out of it may still run."""
        old, own = self.path(older), self.path(name)
        with suppress(Missing):
            record, _ = await self._find_record(old, announced)
            if record is not None:
                spots = self._spots(old, record.job_id)
                if not is_decided(record, _listing(await self._look(spots))):
                    self._still = await self._wait_until_still(lambda: self._look(spots), spots.final)
        failure = await self._try_rename(old, own)
        if failure is None or isinstance(failure, Missing):
            return
        if not isinstance(failure, Failed | DestinationParked):
            await self._watch_by_another_channel()
        try:
            begun = await self._remote.exists(own)
        except Unavailable:
            raise failure from None
        if not begun:
            raise failure
        await self._wait_until_same(lambda: self._look_at(old, own), own)

    async def _settle_taken(self, name: str, announced: AnnouncedPublish | None) -> str:
        """End the publish that an older fence may have begun; its package stays staged if it was not published."""
        own = self.path(name)
        record, names = await self._find_record(own, announced)
        settled = _Settled(False, 0, ())
        if record is not None:
            spots = self._spots(own, record.job_id)
            settled = await self._settle(spots, record, may_finish=announced is not None)
            if settled.published:
                self._published.add(name)
                return self._tell_finished(spots, record, settled) if settled.moves else ""
            await self._forget_record(own)
        if record is not None or names.keys() & {"package"} == set():
            for folder in PARTS_OF_FOLDER:
                await self._remote.make_folder(posixpath.join(own, folder))
        if record is None or not (settled.moves or settled.missing):
            return ""
        return self._tell_undone(self._spots(own, record.job_id), settled)

    async def _merge(self, source: str, target: str) -> None:
        """Bring together what a rename of a staging folder has left in two. Where both have a file, the shorter one is half
        copied. The package goes along only if both are of one manifest."""
        there, _ = await self._wait_until_same(lambda: self._look_at(source, target), target)
        if not there.files:
            return
        spare = posixpath.join(target, "spare", secrets.token_hex(4))
        mine, theirs = await asyncio.gather(self._read_file(target, "manifest.json"), self._read_file(source, "manifest.json"))
        is_same = theirs is None or mine is None or mine == theirs or not _is_json(mine)
        if is_same and theirs is not None:
            await self._remote.replace(posixpath.join(source, "manifest.json"), posixpath.join(target, "manifest.json"))
        if RECORD in there.files:
            await self._remote.replace(posixpath.join(source, RECORD), posixpath.join(target, RECORD))
        kept = ("previous/", "package/") if is_same else ("previous/",)
        taken = (await self._remote.tree(target)).files

        async def move(path: str) -> None:
            if path in taken:
                await self._move_file(target, spare, path)
            await self._move_file(source, target, path)

        better = [path for path, seen in there.files.items() if path not in taken or taken[path].size < seen.size]
        await at_most(MAX_REQUESTS, [move(path) for path in better if path.startswith(kept)])

    async def _read_file(self, folder: str, name: str) -> bytes | None:
        with suppress(Missing):
            return await self._remote.read(posixpath.join(folder, name))
        return None

    async def _look_at(self, *folders: str) -> tuple[Tree, ...]:
        return tuple(await asyncio.gather(*(self._remote.tree(folder) for folder in folders)))

    # --- removing -----------------------------------------------------------------------------------------------

    async def discard(self, task_id: str, successor: Successor) -> None:
        names = [name for name in await self.list_folders() if (found := FOLDER.fullmatch(name)) and found["task"] == task_id]
        await self.remove(names, successor)

    async def clear(self, name: str, successor: Successor) -> None:
        """Remove a folder, with what a removal that broke off has left of it under its other name."""
        plain = name.removesuffix(".gone")
        there = await self.list_folders()
        await self.remove([each for each in (plain, f"{plain}.gone") if each in there], successor)

    async def remove(self, names: list[str], successor: Successor) -> None:
        """Remove the folders of one task. What they have set aside is put back first unless it is superseded; raises
        `Unavailable` ('previous_kept') rather than remove what nothing has replaced."""
        if any(name in self._published for name in names):
            successor = Successor.DELIVERED
        superseded = successor is Successor.DELIVERED
        taken = list(dict.fromkeys([place for name in names for place in await self._take_away(name)]))
        if not superseded:
            for other in taken[1:]:
                await self._merge(other, taken[0])
        for place in taken:
            if not superseded and await self._rescue(place, successor):
                await self._remote.remove_tree(posixpath.join(place, "previous"))
            elif not superseded:  # or half of the package, once it is removed, would look as if it had been published
                await self._forget_record(place)
            await self._remote.remove_tree(place, PARTS_OF_FOLDER)

    async def _take_away(self, name: str) -> list[str]:
        """Take the folder from whoever uses it, by a rename if the server has one; where it is then."""
        own = self.path(name)
        if name.endswith((".gone", ".new")):
            return [own]
        gone = own + ".gone"
        failure = await self._try_rename(own, gone)
        if failure is None:
            return [gone]
        if isinstance(failure, Missing):
            return []
        if not isinstance(failure, Failed | DestinationParked):
            raise failure
        return [own, *([gone] if await self._remote.exists(gone) else [])]

    async def _rescue(self, place: str, successor: Successor) -> bool:
        """Put back what a publish has set aside and not replaced. Return whether the new package has the final name."""
        record, _ = await self._find_record(place, None)
        if record is None:
            return False
        spots = self._spots(place, record.job_id)
        trees = await self._look(spots)
        if not is_decided(record, _listing(trees)):
            trees = await self._wait_until_still(lambda: self._look(spots), spots.final)
        seen = _listing(trees)
        if plan_settlement(record, seen, may_finish=False).published:
            return True
        if seen.final and (successor is Successor.UNKNOWN or find_strangers(record, seen)):
            if seen.aside:
                raise self._kept(spots, f"{spots.final} holds neither the new package nor all of the previous delivery")
            return False
        settled = await self._settle(spots, record, may_finish=False)
        if settled.missing and not settled.published:
            raise self._kept(spots, f"{len(settled.missing)} files of the previous delivery are missing in {spots.final}")
        return settled.published

    def _kept(self, spots: _Spots, why: str) -> Unavailable:
        return Unavailable(
            "previous_kept",
            f"{self._remote.address}: {spots.own} is kept, with 'package' and 'previous' in it: {why}",
            f"Compare them with {spots.final}, move there what is right, then remove {spots.own}.",
        )

    # --- publishing ---------------------------------------------------------------------------------------------

    def note_staged(self, name: str, files: Sizes, previous: Sizes | None) -> None:
        """Remember what was staged, and what had the final name then."""
        self._staged[name] = (files, previous)

    async def list_final(self, job_id: str) -> Sizes:
        return _sizes(await self._tree(posixpath.join(self._base, job_id)))

    async def is_published(self, task_id: str, fence: int) -> bool:
        """Return whether the final name has the package whole. Asked after `adopt`."""
        name = name_folder(task_id, fence)
        own = self.path(name)
        published = name in self._published
        if not published:
            record, names = await self._find_record(own, None)
            if record is None:
                published = "package" not in names
            else:
                seen = _listing(await self._look(self._spots(own, record.job_id)))
                published = plan_settlement(record, seen, may_finish=False).published
        await self._remote.size(own)  # what was listed may have been renamed meanwhile, and be a newer attempt's by now
        return published

    async def publish(self, task_id: str, fence: int, job_id: str, between: Callable[[], None]) -> str:
        """See `DropoffSession.publish`."""
        check_relative(job_id, one_segment=True)
        name = name_folder(task_id, fence)
        spots = self._spots(self.path(name), job_id)
        files, previous = self._staged.get(name) or (_sizes(await self._remote.tree(spots.package)), None)
        record = PublishRecord(job_id, files, previous or {})
        exists = self._remote.exists
        looking = asyncio.gather(exists(spots.package), self._is_replaceable(spots), exists(spots.aside))
        if files:
            await asyncio.gather(looking, self._write_record(spots, record))
        staged, replaces, blocked = await looking
        if not (files and staged):
            if await self.is_published(task_id, fence):
                return ""
            raise Missing("sftp_missing", f"{self._remote.address}: {spots.package} is gone", "It is tried again.")
        if blocked:  # by empty folders, as a rule
            await self._settle(spots, PublishRecord(job_id, {}, None), may_finish=False, is_tidied=True)
            replaces = await exists(spots.final)
        if replaces != bool(previous):
            record = PublishRecord(job_id, files, await self.list_final(job_id))
            await self._write_record(spots, record)
        return await self._publish(name, spots, record, replaces, between)

    async def _is_replaceable(self, spots: _Spots) -> bool:
        """Return whether anything has the final name. Raises `NotPublished` for a link that cannot be set aside: some servers
        (ProFTPD) rename what a link leads to, which may be another's."""
        try:
            found = await self._remote.stat(spots.final)
        except Missing:
            return False
        if found.type == asyncssh.FILEXFER_TYPE_SYMLINK and not await self._renames_links(spots.own):
            raise NotPublished(
                Unavailable(
                    "job_folder_is_link",
                    f"{self._remote.address}: {spots.final} is a symbolic link, and this server renames what a link leads to. "
                    "Nothing was moved",
                    f"Ask the partner to remove the link {spots.final}, or to put a folder in its place.",
                )
            )
        return True

    async def _renames_links(self, own: str) -> bool:
        """Try it out in our own folder. No for a server that lets nobody make links."""
        here, link, moved = (posixpath.join(own, name) for name in ("linked", "link", "link.moved"))
        await self._remote.make_folder(here)
        try:
            await self._remote.ask(f"link {link}", self._remote.channel.symlink(here, link))
            await self._remote.rename(link, moved)
            return (await self._remote.stat(moved)).type == asyncssh.FILEXFER_TYPE_SYMLINK
        except (Missing, Failed, DestinationParked):
            return False

    async def _publish(
        self, name: str, spots: _Spots, record: PublishRecord, replaces: bool, between: Callable[[], None]
    ) -> str:
        failure = None
        if replaces:
            failure = await self._try_rename(spots.final, spots.aside)
            if failure is not None and await self._was_set_aside(spots, record, failure):
                failure = None
            if failure is None:
                between()
        if failure is None:
            failure = await self._try_rename(spots.package, spots.final)
        if failure is None:
            found = await self._tree(spots.final, {folder for path in record.files for folder in list_parents(path)})
            if is_exactly(_sizes(found), record.files):
                self._published.add(name)
                return ""
        return await self._end_broken(name, spots, record, failure)

    async def _was_set_aside(self, spots: _Spots, record: PublishRecord, failure: DeliveryError) -> bool:
        """Return whether a rename that was not answered in time has gone through all the same."""
        if isinstance(failure, Missing | Failed | DestinationParked):
            return False
        try:
            await self._watch_by_another_channel()
            seen = _listing(await self._wait_until_still(lambda: self._look(spots), spots.final))
        except Unavailable:
            raise failure from None
        return not seen.final and holds(seen.aside, record.previous or {}) and is_exactly(seen.package, record.files)

    async def _end_broken(self, name: str, spots: _Spots, record: PublishRecord, failure: DeliveryError | None) -> str:
        """Finish a publish that broke off, or undo it and raise `NotPublished`."""
        answered = failure is None or isinstance(failure, Missing | Failed | DestinationParked)
        try:
            if not answered:
                await self._watch_by_another_channel()
            await self._remote.size(spots.own)
            settled = await self._settle(spots, record, may_finish=True, is_running=not answered, is_tidied=True)
        except Unavailable as error:
            if failure is None or isinstance(error, PublishUnsettled):
                raise
            raise failure from None
        if settled.published:
            self._published.add(name)
            return self._tell_finished(spots, record, settled) if settled.moves else ""
        await self._forget_record(spots.own)
        raise NotPublished(self._explain(spots, record, settled, failure))

    def _explain(self, spots: _Spots, record: PublishRecord, settled: _Settled, failure: DeliveryError | None) -> DeliveryError:
        """Say why nothing was published, and what has the final name now."""
        said = failure.message if failure else f"{self._remote.address} renamed {spots.package} to {spots.final} incompletely"
        before = "the previous delivery" if record.previous else "what had that name"
        now = self._tell_undone(spots, settled) if settled.moves else f"nothing was moved; {spots.final} is as it was"
        if isinstance(failure, Denied):
            denied = Denied(failure.code, f"{said}; {now}", failure.next_step)
            denied.act = failure.act
            return denied
        if isinstance(failure, DestinationParked):
            return DestinationParked(failure.code, f"{said}; {now}", failure.next_step)
        if isinstance(failure, Missing | Failed) and not (settled.broke_off and settled.moves):
            refused = Failed(
                "publish_refused",
                f"{said}; {now}",
                f"Ask the partner whether the login may rename folders, and whether {posixpath.join(self._base, STAGING)} is "
                f"on the same file system as {spots.final}: only there can a folder be renamed. {before.capitalize()} stays.",
            )
            refused.act = failure.act if isinstance(failure, Failed) else None
            return refused
        return Unavailable(
            "publish_broke_off",
            f"{said}; {now}",
            f"Ask the partner whether their server renames folders in one step. Look at {spots.final} if it stays so.",
        )

    def _tell_finished(self, spots: _Spots, record: PublishRecord, settled: _Settled) -> str:
        return (
            f"a rename between {spots.package}, {spots.final} and {spots.aside} had broken off; it was finished by "
            f"{settled.moves} renames of single files, so the package did not become visible at once. "
            f"All {len(record.files)} files are in {spots.final}"
        )

    def _tell_undone(self, spots: _Spots, settled: _Settled) -> str:
        lost = f", but for {len(settled.missing)} files that are nowhere: {', '.join(map(escaped, settled.missing[:3]))}"
        told = f"the previous delivery, set aside for a package that did not follow, is back in {spots.final}"
        return told + (lost if settled.missing else "")

    # --- the record ---------------------------------------------------------------------------------------------

    async def _write_record(self, spots: _Spots, record: PublishRecord) -> None:
        content = {"job_id": record.job_id, "files": dict(record.files), "previous": dict(record.previous or {})}
        path, written = posixpath.join(spots.own, RECORD), json.dumps(content).encode()
        try:
            await self._remote.write(path, written)
        except (Denied, Failed):  # some servers let nobody write over a file (ProFTPD, unless AllowOverwrite is on)
            await self._forget_record(spots.own)
            await self._remote.write(path, written)

    async def _forget_record(self, own: str) -> None:
        await self._remote.put_away([posixpath.join(own, RECORD)], own)

    async def _find_record(
        self, own: str, announced: AnnouncedPublish | None
    ) -> tuple[PublishRecord | None, Mapping[str, object]]:
        """What a publish from this folder was about to do, None if none can have begun; and what is in the folder.

        A release before wrote no record, and some logins may not read it. Then the ledger knows the package, or else its
        manifest does, without sizes."""
        names, aside = await asyncio.gather(self._remote.entries(own), self._entries(posixpath.join(own, "previous")))
        if RECORD in names:
            with suppress(Denied, ValueError, KeyError, TypeError, AttributeError):  # some logins may write, and not read
                content = await self._read_file(own, RECORD)
                return _parse_record(content or b""), names
        if announced is not None:
            return PublishRecord(announced.job_id, announced.files, None), names
        if not aside:
            return None, names
        manifest = await Manifest.read(self._remote, own)
        return PublishRecord(next(iter(aside)), dict.fromkeys(manifest.targets()), None), names

    async def _entries(self, folder: str) -> Mapping[str, object]:
        with suppress(Missing):
            return await self._remote.entries(folder)
        return {}

    # --- looking and moving -------------------------------------------------------------------------------------

    def _spots(self, own: str, job_id: str) -> _Spots:
        spare = posixpath.join(own, "spare", secrets.token_hex(4))
        return _Spots(own, posixpath.join(self._base, job_id), posixpath.join(own, "previous", job_id), spare)

    async def _look(self, spots: _Spots) -> Trees:
        package, final, aside = await asyncio.gather(*(self._tree(each) for each in (spots.package, spots.final, spots.aside)))
        return package, final, aside

    async def _tree(self, top: str, expected: Iterable[str] = ()) -> Tree:
        """What is below the folder; a file in its place is one with an empty path."""
        try:
            return await self._remote.tree(top, expected, skip_denied=True)
        except (Failed, DestinationParked):
            attrs = await self._remote.ask(f"look at {top}", self._remote.channel.lstat(top))
            if attrs.type == asyncssh.FILEXFER_TYPE_DIRECTORY:
                raise
            return Tree({"": Seen(attrs.size or 0, int(attrs.mtime or 0))}, [])

    async def _wait_until_still(self, look: Callable[[], Awaitable[Trees]], where: str) -> Trees:
        package, final, aside = await self._wait_until_same(look, where)
        return package, final, aside

    async def _wait_until_same(self, look: Callable[[], Awaitable[tuple[Tree, ...]]], where: str) -> tuple[Tree, ...]:
        """List until two listings agree. Raises `Unavailable` when the server still moves files after a long time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MOST_WAIT_SECONDS
        before = await look()
        while True:
            await asyncio.sleep(STILL_SECONDS)
            now = await look()
            if all(_is_same(*pair) for pair in zip(before, now, strict=True)):
                return now
            if loop.time() > deadline:
                raise Unavailable(
                    "rename_running",
                    f"{self._remote.address} has been moving files for {MOST_WAIT_SECONDS:.0f} s, to or from {where}",
                    "It is looked at again.",
                )
            before = now

    def _stood_still(self, trees: Trees) -> bool:
        return self._still is not None and all(_is_same(*pair) for pair in zip(self._still, trees, strict=True))

    async def _watch_by_another_channel(self) -> None:
        """The first one may wait behind the rename that was not answered."""
        places = self._channels.places(1)
        if len(places) > 1:
            self._remote = await self._channels.open(places[1]) or self._remote

    async def _settle(
        self, spots: _Spots, record: PublishRecord, *, may_finish: bool, is_running: bool = False, is_tidied: bool = False
    ) -> _Settled:
        """Look until nothing moves, then end what had begun; again, until there is nothing left to move."""
        moves, may_rename_folder, broke_off, failure = 0, True, is_running, None
        for turn in range(TURNS):
            trees = await self._look(spots)
            is_known = turn > 0 or is_decided(record, _listing(trees)) or self._stood_still(trees)
            if is_running or not is_known:
                broke_off = True
                trees = await self._wait_until_still(lambda: self._look(spots), spots.final)
            is_running = False
            seen = _listing(trees)
            plan = plan_settlement(record, seen, may_finish=may_finish)
            if not plan.moves:
                if moves or is_tidied or any(tree.folders and not tree.files for tree in trees[1:]):
                    await self._drop_empty(spots, plan.published, trees)
                return _Settled(plan.published, moves, plan.missing, broke_off)
            if may_rename_folder and not seen.final and _only_puts_back(plan):
                may_rename_folder = False
                await self._remove_empty(trees[1], spots.final)
                failure = await self._try_rename(spots.aside, spots.final)
                is_running = failure is not None and not isinstance(failure, Missing | Failed | DestinationParked)
                moves += failure is None
                continue
            done, failure = await self._carry_out(spots, plan.moves)
            moves += done
            if isinstance(failure, DestinationParked):
                raise failure
            if not done:
                break
        raise self._unsettled(spots, failure)

    def _unsettled(self, spots: _Spots, failure: DeliveryError | None) -> PublishUnsettled:
        why = f": {failure.message}" if failure else ""
        return PublishUnsettled(
            "publish_unsettled",
            f"{self._remote.address}: a publish broke off and can be neither finished nor undone{why}. The package is in "
            f"{spots.package} and {spots.final}, the previous delivery in {spots.aside} and {spots.final}",
            f"Nothing was removed. Compare them, and make {spots.final} complete.",
        )

    async def _carry_out(self, spots: _Spots, moves: Iterable[Move]) -> tuple[int, DeliveryError | None]:
        """Move single files; how many were, and what hindered one. The next listing tells what is left."""
        done, failure = 0, None
        by_path = sorted(moves, key=lambda move: move.path)  # stable: the moves of one file stay in order

        async def move_all(path: str, chain: list[Move]) -> None:
            nonlocal done, failure
            try:
                for each in chain:
                    await self._move_file(spots.of(each.old), spots.of(each.new), path)
                    done += 1
            except (Missing, Failed, DestinationParked) as error:
                failure = error

        chains = [(path, list(chain)) for path, chain in groupby(by_path, key=lambda move: move.path)]
        await at_most(MAX_REQUESTS, [move_all(path, chain) for path, chain in chains])
        return done, failure

    async def _move_file(self, old: str, new: str, path: str) -> None:
        target = _at(new, path)
        try:
            await self._remote.rename(_at(old, path), target)
        except (Missing, Failed):  # as a rule its folder is to be made first
            await self._make_parents(posixpath.dirname(target))
            await self._remote.rename(_at(old, path), target)

    async def _make_parents(self, folder: str) -> None:
        """Never the staging folder itself: a stale attempt must not bring its taken folder back to life."""
        staging = posixpath.join(self._base, STAGING)
        if folder != self._base and posixpath.dirname(folder) != staging:
            await self._make_parents(posixpath.dirname(folder))
            await self._remote.make_folder(folder)

    async def _drop_empty(self, spots: _Spots, published: bool, trees: Trees) -> None:
        """Remove the folders that moves of single files have left empty: of what was set aside, or of what has no file."""
        package, final, aside = trees
        if not aside.files:
            await self._remove_empty(aside, spots.aside)
        if published and not package.files:
            await self._remove_empty(package, spots.package)
        if not final.files:
            await self._remove_empty(final, spots.final)

    async def _remove_empty(self, tree: Tree, top: str) -> None:
        with suppress(Failed, DestinationParked):  # somebody has put a file there meanwhile
            await self._remote.remove_folders([top, *(posixpath.join(top, folder) for folder in tree.folders)])

    async def _try_rename(self, old: str, new: str) -> DeliveryError | None:
        try:
            await self._remote.rename(old, new)
        except (Unavailable, DestinationParked) as failure:
            return failure
        return None


def name_folder(task_id: str, fence: int) -> str:
    return f"{task_id}-{fence}"


def _fences(task_id: str, staged: Iterable[str]) -> list[int]:
    found = (FOLDER.fullmatch(name) for name in staged)
    return [int(each["fence"]) for each in found if each and each["task"] == task_id and not each["state"]]


def _only_puts_back(plan: Settlement) -> bool:
    return not plan.published and all((move.old, move.new) == (Place.ASIDE, Place.FINAL) for move in plan.moves)


def _parse_record(content: bytes) -> PublishRecord:
    found = json.loads(content)
    files: Expected = {str(path): int(size) for path, size in found["files"].items()}
    return PublishRecord(str(found["job_id"]), files, {str(path): int(size) for path, size in found["previous"].items()})


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _sizes(tree: Tree) -> Sizes:
    return {path: seen.size for path, seen in tree.files.items()}


def _listing(trees: Trees) -> Listing:
    package, final, aside = trees
    return Listing(_sizes(package), _sizes(final), _sizes(aside))


def _is_same(before: Tree, now: Tree) -> bool:
    return before.files == now.files and set(before.folders) == set(now.folders)


def _at(folder: str, path: str) -> str:
    return posixpath.join(folder, path) if path else folder
