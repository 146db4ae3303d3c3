"""Find the classes of an image folder, `[split/]class/**/image`, and account for everything else in it."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..explanation import listed
from ..images import HEIC_ENDINGS, FolderEntry, image_endings, is_image, walk_folder
from .labels import DataError, normalised

__all__ = ["EVAL_NAMES", "TRAIN_NAMES", "Account", "ImageFolder"]

# Names of splits, in order of preference. Validation comes before test, because the test labels of many datasets on the
# Hub are withheld (-1).
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_EXAMPLES = 2  # paths named for each reason


class Account:
    """What became of the files and folders in an image folder; paths are relative to it."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}  # images by split
        self.links = 0  # linked files and folders, followed
        self.remarks: list[str] = []
        self._left_out: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def leave_out(self, path: str, reason: str) -> None:
        """Count a file or folder that is not used."""
        self._left_out[reason] += 1
        if self._left_out[reason] <= _EXAMPLES:
            self._examples.setdefault(reason, []).append(_printable(path))

    def notes(self) -> list[str]:
        """Return a line for each reason why something is not used, and one about links."""
        notes = list(self.remarks)
        if self.links:
            notes.append(f"{self.links:,} link{'s' * (self.links > 1)} to files or folders followed")
        other = {reason: count for reason, count in self._left_out.items() if reason.startswith("no image, ")}
        for reason, count in self._left_out.items():
            if reason not in other:
                notes.append(f"{count:,} left out, {reason}: {self._named(reason, count)}")
        if other:
            count, kinds = (
                sum(other.values()),
                (f"{n:,} {kind.removeprefix('no image, ')}" for kind, n in other.items()),
            )
            notes.append(f"{count:,} left out, no image ({listed(kinds)}): {self._named(next(iter(other)), count)}")
        return notes

    def facts(self) -> dict[str, Any]:
        """Return the account as JSON-able values."""
        left_out = {
            reason: {"count": count, "examples": self._examples[reason]} for reason, count in self._left_out.items()
        }
        return {"used": self.used, "links": self.links, "left_out": left_out}

    def _named(self, reason: str, count: int) -> str:
        return ", ".join(self._examples[reason]) + (", ..." if count > len(self._examples[reason]) else "")


class ImageFolder:
    """The splits of an image folder. `read` finds the classes and images of one.

    Folders are splits if they have usual names and class folders in them, and nothing beside them that may be a class.

    Args:
        root: The folder.
        entries: Everything in it.
        wanted: Folders that the user calls splits, whatever their names; they may be paths such as `a/b`.

    Attributes:
        names: Names of the splits.
        account: What became of everything in the folder; complete after `finish`.

    Raises:
        DataError: The folders may be splits or classes.
    """

    def __init__(self, root: str, entries: list[FolderEntry], wanted: Sequence[str | None] = ()) -> None:
        self.root, self.account = root, Account()
        self._endings = image_endings()
        self._places = {"train": ""}  # of the splits, relative to the root
        self._entries: dict[str, list[FolderEntry]] = {}
        self._hints: dict[str, str] = {}
        top = walk_folder(root, deep=False)
        folders = [entry.path for entry in top if entry.kind == "folder"]
        wanted = [name for name in wanted if name and os.path.isdir(os.path.join(root, name))]
        named = [name for name in folders if name.lower() in TRAIN_NAMES + EVAL_NAMES]
        if wanted or named:
            inside = {name: walk_folder(os.path.join(root, name)) for name in dict.fromkeys([*folders, *wanted])}
            splits = list(dict.fromkeys([*wanted, *self._find_splits(inside, named, sure=bool(wanted))]))
            if splits:
                self._places = {name: name for name in splits}
                self._entries = {name: inside[name] for name in splits}
                self._leave_out([entry for entry in top if entry.kind != "folder"], "beside the splits")
                self.account.links += sum(entry.link for entry in top if entry.kind == "folder")
                for name in [name for name in folders if name not in splits]:
                    if all(entry.kind == "folder" for entry in inside[name]):
                        self.account.leave_out(name, "empty folder")
                    rest = [entry for entry in inside[name] if not _is_in(os.path.join(name, entry.path), splits)]
                    self._leave_out(rest, "in no class folder" if name in named else "beside the splits", name)
        if not self._entries:
            self._entries = {"train": entries}
        self.names = tuple(self._entries)

    def place(self, split: str) -> str:
        """Return the folder of a split's class folders."""
        return os.path.join(self.root, self._places[split]) if self._places[split] else self.root

    def read(self, split: str) -> dict[str, list[str]]:
        """Return the paths of the images of each class.

        Raises:
            DataError: There are no images, a class has none that can be used, or the classes look like splits.
        """
        place, shown = self.place(split), self._places[split]
        prefix = os.path.join(place, "")
        found: dict[str, list[str]] = {}  # by class folder
        lost: dict[str, Counter[str]] = {}
        loose = 0
        for path, kind, link in self._entries.pop(split):
            name, _, rest = path.partition(os.sep)
            if kind == "folder":
                self.account.links += link
                found.setdefault(name, [])
                continue
            lost_link = kind == "broken link" and "." not in name
            if not rest and (lost_link or kind == "link to a folder that is included already"):
                found.setdefault(name, [])  # it was meant to be a class folder
            reason = self._unusable(prefix + path) if kind == "file" else kind
            if not reason and rest:
                self.account.links += link
                found[name].append(path)
                continue
            if not reason:
                loose, reason = loose + 1, "beside the class folders"
            elif kind != "hidden":
                lost.setdefault(name, Counter())[reason] += 1
            self.account.leave_out(os.path.join(shown, path), reason)
        for name, paths in list(found.items()):
            if not paths and name in lost:
                reasons = listed(f"{count:,} {reason}" for reason, count in lost[name].items())
                raise DataError(
                    f"no image in the class folder {os.path.join(place, name)!r} can be used ({reasons}): convert its "
                    "files, or move the folder away to go without this class"
                )
            if not paths:
                self.account.leave_out(os.path.join(shown, name), "empty folder, so not a class")
                del found[name]
        if not found:
            example = os.path.join(os.path.basename(os.path.abspath(place)), "cat", "1.png")
            raise DataError(
                f"no images in {place!r}" + (f" but {loose:,} that are in no class folder" if loose else "") + ": "
                f"expected one folder per class with image files in it ({example}), or *.parquet files"
            )
        self._check_names(split, found)
        self._hints[split] = _deeper_classes(place, found)
        classes: dict[str, list[str]] = {}
        for name in sorted(found, key=lambda name: (normalised(name), name)):
            if normalised(name) in classes:
                self.account.remarks.append(f"two folders spell {name!r} differently in Unicode; they are one class")
            classes.setdefault(normalised(name), []).extend(prefix + path for path in found[name])
        self.account.used[split] = sum(len(paths) for paths in classes.values())
        return classes

    def finish(self) -> None:
        """Account for the splits that were not read."""
        for name, entries in self._entries.items():
            self._leave_out(entries, f"in the split {name}, which is not used", name)
        self._entries = {}

    def hint(self, split: str) -> str:
        """Say which folder may be meant, if the only class folder of a split that was read has folders in it."""
        return self._hints.get(split, "")

    def _find_splits(self, inside: dict[str, list[FolderEntry]], named: list[str], *, sure: bool) -> list[str]:
        """Return which of the folders named like splits are splits."""
        divided = {name: {e.path.split(os.sep)[0] for e in inside[name] if os.sep in e.path} for name in named}
        splits = [name for name in named if divided[name]]
        others = [name for name in inside if name not in splits and self._has_images(name, inside[name])]
        train = [name for name in splits if name.lower() in TRAIN_NAMES]
        shared = any(divided[one] & divided[other] for one in train for other in splits if one != other)
        if sure or shared or not others or not splits or (train and set(others) <= set(named)):
            return splits
        raise DataError(
            f"{self.root!r}: {listed(splits)} may be splits with the classes {listed(sorted(divided[splits[0]]))}, or "
            f"classes like {listed(others)}. For splits, name them with --train-split and --test-split; for classes, "
            f"move all these folders into a new one, {os.path.join(self.root, 'train')!r}"
        )

    def _check_names(self, split: str, found: dict[str, list[str]]) -> None:
        """Refuse class folders that look like splits."""
        kinds = {name: _split_kind(name) for name in found}
        likely = [name for name, kind in kinds.items() if kind]
        nested = {name for name, paths in found.items() if any(path.count(os.sep) > 1 for path in paths)}
        both = {"train", "test"} <= set(kinds.values())
        if (both and (2 * len(likely) >= len(found) or set(likely) == nested)) or (set(likely) & nested == set(found)):
            flags = []
            for kind in ("train", "test"):
                first = next((name for name in likely if kinds[name] == kind), None)
                flags += [f"--{kind}-split {os.path.join(self._places[split], first)}"] if first else []
            remedy = f"use {' '.join(flags)}"
            if not set(likely) & nested:
                remedy = f"sort their images into class folders ({os.path.join(likely[0], 'cat', '1.png')})"
            raise DataError(
                f"names like splits, not classes, in {self.place(split)!r}: {listed(likely)}. If they are splits, "
                f"{remedy}; if they are classes, rename them"
            )

    def _has_images(self, name: str, entries: list[FolderEntry]) -> bool:
        place = os.path.join(self.root, name)
        return any(e.kind == "file" and not self._unusable(os.path.join(place, e.path)) for e in entries)

    def _leave_out(self, entries: list[FolderEntry], reason: str, folder: str = "") -> None:
        for path, kind, _ in entries:
            if kind != "folder":
                why = self._unusable(os.path.join(self.root, folder, path)) if kind == "file" else kind
                self.account.leave_out(os.path.join(folder, path), why or reason)

    def _unusable(self, path: str) -> str:
        """Return why a file is not used, "" if it is."""
        if not path.isascii():
            try:
                path.encode()
            except UnicodeEncodeError:
                return "name is not UTF-8"
        ending = os.path.splitext(path)[1].lower()
        if ending in self._endings:
            return ""
        if ending in HEIC_ENDINGS:
            return "HEIC, which needs pillow-heif (pip install pillow-heif)"
        if re.fullmatch(r"\.[a-z]\w*", ending):
            return f"no image, {ending}"
        return "" if is_image(path) else "no image, without ending"


def _is_in(path: str, folders: list[str]) -> bool:
    return any(f"{path}{os.sep}".startswith(f"{folder}{os.sep}") for folder in folders)


def _deeper_classes(place: str, found: dict[str, list[str]]) -> str:
    inside = {tuple(path.split(os.sep)[:-1]) for paths in found.values() for path in paths}
    depth = 0
    while len({parts[: depth + 1] for parts in inside}) == 1 and min(map(len, inside)) > depth:
        depth += 1
    deeper = sorted({parts[depth] for parts in inside if len(parts) > depth})
    if depth == 0 or len(deeper) < 2:
        return ""
    return f"one folder too high? {os.path.join(place, *min(inside)[:depth])!r} has the folders {listed(deeper)}"


def _printable(path: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in path)


def _split_kind(name: str) -> str:
    """Return "train" or "test" if a folder's name has such a word in it, such as `seg_train` or `testSet`, else ""."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    words = {word.removesuffix("set") for word in words}
    return "train" if words & set(TRAIN_NAMES) else "test" if words & set(EVAL_NAMES) else ""
