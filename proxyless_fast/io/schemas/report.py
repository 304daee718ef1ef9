"""report.json of a run: figures by stage. What a stage notes is its own; what is read again is checked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .common import Rate, Real, Size, Whole

Milliseconds = Annotated[Real, Field(ge=0)]
Count = Annotated[Whole, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]


class Loose(BaseModel):
    """Figures that are not named here are taken as they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class Stage(Loose):
    """Figures of a stage."""

    seconds: Milliseconds
    files: list[str] = []


class Space(Loose):
    """The search space, as it is built again."""

    name: str
    num_classes: Size
    in_channels: Size
    resolution: Size
    width: Annotated[Real, Field(gt=0, le=64)] | None = None
    candidates: list[str] | None = None


class Data(Loose):
    """The images, as they are loaded again."""

    name: str
    batch_size: Annotated[Whole, Field(ge=1)]
    seed: Count
    valid_fraction: Rate
    shift: Count


class Search(Stage):
    target: Milliseconds | None
    target_source: str


class Profile(Stage):
    fastest: Milliseconds
    slowest: Milliseconds
    threads: Size = 1


class Choice(Loose):
    """What a mixed op became."""

    label: str
    name: str
    probability: Fraction
    input: Annotated[list[Whole], Field(min_length=3, max_length=3)] | None = None
    output: Annotated[list[Whole], Field(min_length=1, max_length=3)] | None = None
    stride: Whole | None = None
    kernel: Whole | None = None
    expand: Whole | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Choice:
        if (self.input is None) != (self.output is None):
            raise ValueError("output must be given where input is, and only there")
        return self


class Derive(Stage):
    target: Milliseconds | None
    predicted: Milliseconds | None
    parameters: Count
    macs: Count
    note: str
    blocks: list[Choice]


class Eval(Stage):
    top1: Fraction
    top5: Fraction


class Export(Stage):
    measured: Milliseconds
    threads: Size


class Total(Loose):
    seconds: Milliseconds


class Report(Loose):
    """A whole report; a stage that has not run is not in it."""

    space: Space | None = None
    data: Data | None = None
    profile: Profile | None = None
    search: Search | None = None
    derive: Derive | None = None
    train: Stage | None = None
    eval: Eval | None = None
    export: Export | None = None
    total: Total | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_is_there_is_something(cls, report: dict[str, Any]) -> dict[str, Any]:
        if not cls.model_fields.keys() & report.keys():
            raise ValueError("expected the figures of a stage, got none")
        for name in cls.model_fields:
            if name in report and report[name] is None:
                raise ValueError(f"{name} must be an object, got nothing")
        return report

    @model_validator(mode="after")
    def _what_a_stage_went_by_is_there(self) -> Report:
        for stage, needed in (("derive", "search"), ("search", "data"), ("search", "space")):
            if getattr(self, stage) is not None and getattr(self, needed) is None:
                raise ValueError(f"{needed} is missing, and {stage} is there")
        return self
