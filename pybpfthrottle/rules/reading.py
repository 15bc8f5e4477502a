"""Rules files: found, read and checked as a whole. Nothing of files with a mistake is used."""

from __future__ import annotations

import glob
import os
import re
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Optional, Sequence, Union
from zlib import crc32

from pybpfthrottle import networks, quota, settings, shares
from pybpfthrottle.errors import Error, RulesError, SettingsError, ShareError
from pybpfthrottle.fleet import redis
from pybpfthrottle.model import BLOCKED, TRAFFIC_KINDS, Direction, Rate
from pybpfthrottle.rules import groups, schedule, when
from pybpfthrottle.rules.groups import GroupRule
from pybpfthrottle.rules.model import KINDS, Criteria, Rule
from pybpfthrottle.shares import GroupSpec, Member, Rates

if TYPE_CHECKING:
    from pybpfthrottle.conditions.network import Asked

_DIRECTORY = "rules.d"
SYSTEM_DIRECTORY = f"/etc/pybpfthrottle/{_DIRECTORY}"
MOST_RULES = 2000
_LONGEST_NAME = 64
_PATTERN = "*.toml"
# In an address, which is shown where it has a mistake.
_PASSWORD = re.compile("//.*@")


class Rules(NamedTuple):
    """All rules of some files, in the order in which they are written."""

    rules: tuple[Rule, ...] = ()
    groups: tuple[GroupRule, ...] = ()
    files: tuple[str, ...] = ()


def directories(environment: Mapping[str, str]) -> list[str]:
    """Return where rules are by default: the system's directory, and the user's."""
    home = settings.config_home(environment)
    return [SYSTEM_DIRECTORY, *([os.path.join(home, _DIRECTORY)] if home else [])]


def read(sources: Sequence[str]) -> Rules:
    """Read files, and all ``*.toml`` of directories, in the order of their names.

    Raises RulesError with all mistakes, each with its file and line.
    """
    files = [path for source in sources for path in _files(source)]
    mistakes: list[str] = []
    rules: list[Rule] = []
    found: list[GroupRule] = []
    for path in files:
        text = _text(path, mistakes)
        if text is None:
            continue
        file = _File(path, text, mistakes)
        rules += file.rules()
        found += file.groups()
    _refuse_twice(rules, mistakes)
    if len(rules) > MOST_RULES:
        mistakes.append(f"{len(rules)} rules are too many: at most {MOST_RULES}")
    mistakes = mistakes or groups.mistakes(found, rules)
    if mistakes:
        raise RulesError(mistakes)
    seated = tuple(groups.seated(rule, found) for rule in rules)
    return Rules(seated, tuple(found), tuple(files))


def places(sources: Sequence[str]) -> str:
    """Return where rules are looked for, for people."""
    return " or ".join(
        os.path.join(source, _PATTERN) if _is_directory(source) else source for source in sources
    )


def _files(source: str) -> list[str]:
    if _is_directory(source):
        return sorted(glob.glob(os.path.join(glob.escape(source), _PATTERN)))
    return [source]


def _is_directory(source: str) -> bool:
    # The usual directories need not be there, or may be made later.
    return os.path.isdir(source) or os.path.basename(source) == _DIRECTORY


def _text(path: str, mistakes: list[str]) -> Optional[str]:
    try:
        text = settings.read_trusted(path)
    except SettingsError as error:
        mistakes.append(str(error))
        return None
    if text is None:
        mistakes.append(f"there is no file {path}")
    return text


def _refuse_twice(rules: Sequence[Rule], mistakes: list[str]) -> None:
    first: dict[str, Rule] = {}
    for rule in rules:
        before = first.setdefault(rule.name, rule)
        if before is not rule:
            mistakes.append(
                f"{rule.where}: a rule {rule.name!r} is in {before.where} already: give it another"
                " name"
            )


class _MistakeError(Exception):
    """What is wrong with a value, and what is allowed."""


def _text_of(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _MistakeError("it must be a text that is not empty")
    return value


def _name(value: Any) -> str:
    text = _text_of(value)
    if len(text) > _LONGEST_NAME or not text.isprintable():
        raise _MistakeError(f"it must be at most {_LONGEST_NAME} printable characters")
    return text


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str) and one.strip() for one in values):
        raise _MistakeError("it must be a text, or a list of texts")
    return tuple(dict.fromkeys(values))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _MistakeError("it must be true or false")
    return value


def _rate(value: Any) -> Rate:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _MistakeError('it must be a rate such as "500K", "1.5M" or "8mbit"')
    return Rate.parse(value) if isinstance(value, str) else Rate.of(value)


def _block(value: Any) -> tuple[Direction, ...]:
    if isinstance(value, bool):
        return tuple(Direction) if value else ()
    found = tuple(one for one in Direction if str(one) == value)
    if not found:
        raise _MistakeError('it must be true, "download" or "upload"')
    return found


def _kind(value: Any) -> str:
    if value not in TRAFFIC_KINDS:
        raise _MistakeError("it must be one of " + ", ".join(f'"{one}"' for one in TRAFFIC_KINDS))
    return str(value)


def _networks(value: Any) -> tuple[str, ...]:
    return tuple(str(networks.parse(text)) for text in _texts(value))


def _criteria(value: Any) -> Criteria:
    if not isinstance(value, dict) or not value:
        raise _MistakeError(f"it must be a table with some of {', '.join(KINDS)}")
    given = {}
    for kind, values in value.items():
        if kind not in KINDS:
            raise _MistakeError(settings.unknown_key(kind, KINDS))
        try:
            given[kind] = _texts(values)
        except _MistakeError as mistake:
            raise _MistakeError(f"{kind} is {values!r}: {mistake}") from None
        if kind in _CHECKS:
            _CHECKS[kind](given[kind])
    return Criteria(**given)


def _check_expressions(values: Sequence[str]) -> None:
    for one in values:
        try:
            re.compile(one)
        except re.error as error:
            raise _MistakeError(
                f"command_regex {one!r} is no regular expression: {error}"
            ) from error


def _check_labels(values: Sequence[str]) -> None:
    for one in values:
        if "=" not in one:
            raise _MistakeError(f'label {one!r} has no value: write "NAME=VALUE"')


def _check_executables(values: Sequence[str]) -> None:
    for one in values:
        if not one.startswith(("/", "*")):
            raise _MistakeError(f"exe {one!r} is no absolute path: for the name alone use name")


def _weight(value: Any) -> float:
    return Member.of("", weight=value).weight


def _rates(value: Any) -> Rates:
    """Return a rate for both directions, or of each one of ``{ download = "2M" }``."""
    rates = value.values() if isinstance(value, dict) else [value]
    found = [_rate(one) for one in rates]
    if not isinstance(value, dict):
        return dict.fromkeys(Direction, found[0])
    return shares.rates("rate", dict(zip(value, found)))


def _address(value: Any) -> str:
    redis.parse(_text_of(value))
    return str(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _MistakeError("it must be a number from 1 up")
    return int(value)


def _wrong(value: Any) -> str:
    if not isinstance(value, str):
        raise _MistakeError("it must be a text, as on the command line")
    return value


# What is to be wrong with a network; ``connections`` is --block.
_NETWORK = (
    *("profile", "delay", "jitter", "loss", "download_loss", "upload_loss", "outage"),
    *("duplicate", "reorder", "corrupt", "connections", "dns", "seed"),
)

_CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "command_regex": _check_expressions,
    "label": _check_labels,
    "exe": _check_executables,
}

# The keys of a rule, and how their values are read.
KEYS: dict[str, Callable[[Any], Any]] = {
    "name": _name,
    "match": _criteria,
    "download": _rate,
    "upload": _rate,
    "block": _block,
    "each": _flag,
    "children": _flag,
    "traffic": _kind,
    "to": _networks,
    "except": _networks,
    "loopback": _flag,
    "insist": _flag,
    "enabled": _flag,
    "schedule": schedule.parse,
    "when": when.parse,
    "quota": quota.parse,
    "group": _text_of,
    "weight": _weight,
    "floor": _rates,
    "ceiling": _rates,
    **dict.fromkeys(_NETWORK, _wrong),
}
# Those of a group.
GROUP_KEYS: dict[str, Callable[[Any], Any]] = {
    "total": _rate,
    "download": _rate,
    "upload": _rate,
    "group": _text_of,
    "weight": _weight,
    "floor": _rates,
    "ceiling": _rates,
    "shared": _address,
    "machines": _count,
}
_SHARE = ("weight", "floor", "ceiling")
# A field of Rule that is called otherwise.
_FIELDS = {"match": "criteria", "traffic": "kind", "except": "but"}


class _File:
    """One file. Mistakes are added to a list."""

    def __init__(self, path: str, text: str, mistakes: list[str]) -> None:
        self._path = path
        self._lines = text.splitlines()
        self._mistakes = mistakes
        self._tree: Mapping[str, Any] = {}
        try:
            self._tree = settings.parse_toml(path, text)
        except SettingsError as error:
            mistakes.append(str(error))

    def rules(self) -> list[Rule]:
        """Return its rules, as far as they have no mistake."""
        for key in self._tree:
            if key not in ("rule", "group"):
                line = self._line(rf"\[*\s*{re.escape(key)}\b")
                self._add(line, settings.unknown_key(key, ["rule", "group"]))
        tables = self._tree.get("rule", [])
        if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
            self._add(self._line(r"\[?\s*rule\b"), "write [[rule]] above each rule")
            return []
        found = [self._rule(number, table) for number, table in enumerate(tables)]
        return [rule for rule in found if rule is not None]

    def _rule(self, number: int, table: Mapping[str, Any]) -> Optional[Rule]:
        before = len(self._mistakes)
        start = self._line(r"\[\[\s*rule\s*\]\]", skip=number)
        given = self._given(table, KEYS, start)
        if len(self._mistakes) == before:
            self._check(start, given)
            given["member"] = self._member(start, given)
            given["network"] = self._network(start, given)
        if len(self._mistakes) > before or not given.pop("enabled", True):
            return None
        limits = {one: given.pop(str(one)) for one in Direction if str(one) in given}
        limits.update(dict.fromkeys(given.pop("block", ()), BLOCKED))
        if given["network"] is not None:
            limits = {**given["network"].limits, **limits}
        fields = {_FIELDS.get(key, key): value for key, value in given.items()}
        return Rule(limits=limits, where=f"{self._path}, line {start}", **fields)

    def groups(self) -> list[GroupRule]:
        """Return its groups, as far as they have no mistake."""
        tables = self._tree.get("group", {})
        if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
            self._add(self._line(r"\[?\[?\s*group\b"), "write [group.NAME] above each group")
            return []
        found = [self._group(name, table) for name, table in tables.items()]
        return [group for group in found if group is not None]

    def _group(self, name: str, table: Mapping[str, Any]) -> Optional[GroupRule]:
        before = len(self._mistakes)
        start = self._line(rf"\[\s*group\s*\.\s*[\"']?{re.escape(name)}\b")
        given = self._given(table, GROUP_KEYS, start)
        within = self._member(start, given)
        if given.get("shared") and within is not None:
            self._add(start, "a group within a group cannot be shared: share the outer one")
        fleet = {key: given.pop(key) for key in ("shared", "machines") if key in given}
        if len(self._mistakes) > before:
            return None
        try:
            spec = GroupSpec.of(name, within=within, **given)
        except ShareError as error:
            self._add(start, str(error))
            return None
        return GroupRule(spec, where=f"{self._path}, line {start}", **fleet)

    def _given(
        self, table: Mapping[str, Any], keys: Mapping[str, Callable[[Any], Any]], start: int
    ) -> dict[str, Any]:
        """Return the values of a table, as far as they have no mistake."""
        given: dict[str, Any] = {}
        for key, value in table.items():
            line = self._line(rf"(\[+\s*rule\s*\.\s*)?[\"']?{re.escape(key)}\b", after=start)
            if key not in keys:
                self._add(line, settings.unknown_key(key, keys))
                continue
            try:
                given[key] = keys[key](value)
            except (_MistakeError, Error) as mistake:
                self._add(line, f"{key} is {_shown(value)}: {mistake}")
        return given

    def _member(self, start: int, given: dict[str, Any]) -> Optional[Member]:
        """Take what makes it a member of a group out of what is given; limits are ceilings too."""
        weight, floor, ceiling = (given.pop(key, None) for key in _SHARE)
        group = given.pop("group", None)
        if group is None:
            lacks = [key for key, value in zip(_SHARE, (weight, floor, ceiling)) if value]
            if lacks:
                self._add(start, f'{lacks[0]} needs a group: add group = "..."')
            return None
        ceilings = dict(ceiling or {})
        for one in Direction:
            rates = [rate for rate in (ceilings.get(one), given.get(str(one))) if rate]
            ceilings.update({one: min(rates)} if rates else {})
        try:
            return Member.of(
                group, weight=weight or 1, floor=_by_name(floor), ceiling=_by_name(ceilings)
            )
        except ShareError as error:
            self._add(start, str(error))
            return None

    def _network(self, start: int, given: dict[str, Any]) -> Optional[Asked]:
        """Take what is to be wrong with a network out of what is given."""
        texts = {key: given.pop(key) for key in _NETWORK if key in given}
        if not texts:
            return None
        if given["member"] is not None or given.get("to") or given.get("but"):
            self._add(start, "a bad network is for all traffic: remove to, except and group")
            return None
        from pybpfthrottle.conditions.network import Asked, refuse_what_is_missing

        profile = texts.pop("profile", "")
        if "connections" in texts:
            texts["block"] = texts.pop("connections")
        # Read again, it is the same.
        texts.setdefault("seed", str(crc32(given["name"].encode())))
        rates = {str(one): given[str(one)] for one in Direction if str(one) in given}
        try:
            asked = Asked.of(profile, **rates, **texts)
            refuse_what_is_missing(asked.conditions)
        except Error as error:
            self._add(start, str(error))
            return None
        return asked

    def _check(self, start: int, given: Mapping[str, Any]) -> None:
        """Add what is wrong with the rule as a whole."""
        if "name" not in given:
            self._add(start, 'this rule has no name: add name = "..."')
        if "match" not in given:
            self._add(start, "this rule matches nothing: add match = { ... }")
        if not _limits_something(given):
            self._add(
                start,
                "this rule limits nothing: add download, upload, block, a quota, a group,"
                " or what is to be wrong with its network",
            )
        for one in given.get("block", ()):
            if str(one) in given:
                self._add(start, f"{one} is both limited and blocked: remove one of the two")
        if "group" in given and (
            given.get("block") or any(given.get(str(one)) == BLOCKED for one in Direction)
        ):
            self._add(start, "what is blocked has no part of a group: remove group, or the block")

    def _add(self, line: int, text: str) -> None:
        self._mistakes.append(f"{self._path}, line {line}: {text}")

    def _line(self, pattern: str, *, after: int = 1, skip: int = 0) -> int:
        """Return the line, from ``after`` on, that begins with a pattern: TOML does not say."""
        for number, line in enumerate(self._lines[after - 1 :], after):
            if re.match(rf"\s*{pattern}", line):
                if not skip:
                    return number
                skip -= 1
        return after


def _by_name(rates: Optional[Rates]) -> dict[str, Union[str, int, Rate]]:
    return {str(direction): rate for direction, rate in (rates or {}).items()}


def _limits_something(given: Mapping[str, Any]) -> bool:
    timetable = given.get("schedule")
    return (
        any(key in given for key in (*map(str, Direction), "quota", "group", *_NETWORK))
        or bool(given.get("block"))
        or (timetable is not None and any(span.limits for span in timetable.spans))
    )


def _shown(value: Any) -> str:
    text = _PASSWORD.sub("//...@", repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
