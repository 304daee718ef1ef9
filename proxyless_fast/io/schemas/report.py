"""report.json of a run: figures by stage. What a stage notes is its own; what other stages read is checked."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .common import Real, Size

Milliseconds = Annotated[Real, Field(ge=0)]


class Loose(BaseModel):
    """Figures of a stage; those that are not named here are taken as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    seconds: Milliseconds | None = None


class Space(Loose):
    name: str
    resolution: Size | None = None
    num_classes: Size | None = None
    in_channels: Size | None = None


class Data(Loose):
    name: str


class Search(Loose):
    target: Milliseconds | None = None


class Profile(Loose):
    threads: Size = 1


class Derive(Loose):
    target: Milliseconds | None = None
    predicted: Milliseconds | None = None


class Report(BaseModel):
    """A whole report; a stage that has not run is not in it."""

    model_config = ConfigDict(extra="allow", strict=True)

    space: Space | None = None
    data: Data | None = None
    profile: Profile | None = None
    search: Search | None = None
    derive: Derive | None = None
    train: Loose | None = None
    eval: Loose | None = None
    export: Loose | None = None
    total: Loose | None = None
