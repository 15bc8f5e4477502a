"""Networks by the names that people know, with their numbers; own ones are in ``profiles.toml``.

The numbers are those that web developers' tools have made customary. No real network is exactly so,
and each is printed wherever its name is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping, Optional

from pybpfthrottle import settings
from pybpfthrottle.conditions import texts
from pybpfthrottle.conditions.model import Conditions
from pybpfthrottle.errors import LimitError, SettingsError
from pybpfthrottle.model import Direction, Rate

RATES = {"download": Direction.DOWNLOAD, "upload": Direction.UPLOAD}


@dataclass(frozen=True)
class Profile:
    """A network by name: its rates, and what is wrong with it, as texts."""

    name: str
    about: str
    rates: Mapping[Direction, Rate]
    texts: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any], source: str = "") -> Profile:
        """Read a profile as in a file. Raises LimitError, which says what is wrong with it."""
        wrong = [key for key, value in given.items() if not isinstance(value, str)]
        if wrong:
            raise LimitError(f"profile {name}: {wrong[0]} has to be a text, in quotes")
        rates = {
            direction: Rate.parse(given[key]) for key, direction in RATES.items() if key in given
        }
        rest = {key: text for key, text in given.items() if key not in (*RATES, "about")}
        profile = cls(name, given.get("about", ""), rates, rest, source)
        try:
            profile.conditions()
        except LimitError as error:
            raise LimitError(f"profile {name}: {error}") from error
        return profile

    def conditions(self, more: Mapping[str, str] = {}) -> Conditions:
        """Return what is wrong with it, and what ``more`` texts ask for instead."""
        return texts.conditions_from({**self.texts, **more})

    def numbers(self) -> str:
        """Return all its numbers in a line."""
        parts = [f"{direction} {rate.written()}" for direction, rate in self.rates.items()]
        wrong = self.conditions()
        return ", ".join([*parts, *([texts.described(wrong)] if wrong else [])])

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON: rates in bytes per second, and the texts."""
        rates = {
            f"{direction}_bytes_per_s": rate.bytes_per_s for direction, rate in self.rates.items()
        }
        return {
            "name": self.name,
            "about": self.about,
            **rates,
            **self.texts,
            "source": self.source,
        }


def _known(name: str, about: str, download: str, upload: str, **more: str) -> Profile:
    return Profile.of(name, {"about": about, "download": download, "upload": upload, **more})


BUILT_IN = (
    _known("edge", "mobile, 2G", "240kbit", "200kbit", delay="840ms"),
    _known("slow-3g", "mobile, far from the mast", "400kbit", "400kbit", delay="400ms"),
    _known("3g", "mobile, 3G", "1.6mbit", "768kbit", delay="300ms"),
    _known("4g", "mobile, 4G", "9mbit", "9mbit", delay="170ms"),
    _known("lte", "mobile, LTE with a good signal", "12mbit", "12mbit", delay="70ms"),
    _known("dsl", "a slow line at home", "1.5mbit", "384kbit", delay="50ms"),
    _known("cable", "a television cable at home", "5mbit", "1mbit", delay="28ms"),
    _known(
        *("wifi-bad", "a wireless network at the edge of its reach", "10mbit", "5mbit"),
        delay="40ms",
        jitter="30ms",
        loss="burst:3%,4",
    ),
    _known(
        *("satellite", "a geostationary satellite", "25mbit", "3mbit"),
        delay="600ms",
        jitter="20ms",
        loss="0.1%",
    ),
    _known(
        *("train", "mobile on a train, with tunnels", "5mbit", "2mbit"),
        delay="120ms",
        jitter="60ms",
        loss="burst:2%,10",
        outage="5s/60s",
    ),
    Profile.of("lossy", {"about": "nothing but lost packets", "loss": "5%"}),
    Profile.of("offline", {"about": "no network at all", "outage": "always"}),
)


def all_profiles(own: Optional[Iterable[Profile]] = None) -> dict[str, Profile]:
    """Return the profiles by their names; ``own`` ones replace those that come with the package.

    Raises LimitError or SettingsError for own ones that cannot be read.
    """
    return {one.name: one for one in (*BUILT_IN, *(own_profiles() if own is None else own))}


def find(name: str) -> Profile:
    """Return a profile by its name. Raises LimitError if there is none, with those there are."""
    found = all_profiles()
    if name not in found:
        raise LimitError(f"there is no profile {name!r}: give {', '.join(found)}")
    return found[name]


def files() -> list[str]:
    """Return the files of own profiles: beside the configuration files, as far as there are any."""
    found = settings.config_files(os.environ)
    return [os.path.join(os.path.dirname(path), "profiles.toml") for path in found]


def own_profiles() -> list[Profile]:
    """Return the profiles of the files, each of which is a table: ``[office]``.

    Raises SettingsError, which names the file.
    """
    found = []
    for path in files():
        text = settings.read_trusted(path)
        for name, given in settings.parse_toml(path, text).items() if text is not None else ():
            if not isinstance(given, dict):
                raise SettingsError(f"{path}: {name} stands alone; write [{name}] and its values")
            try:
                found.append(Profile.of(name, given, path))
            except LimitError as error:
                raise SettingsError(f"{path}: {error}") from error
    return found
