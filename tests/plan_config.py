"""A config from the names of its keys alone, for tests of planning."""

from dataclasses import fields

from omniloom.config import Config, DataConfig, TrainConfig


def plan_config(**keys: object) -> Config:
    of_data = {item.name for item in fields(DataConfig)}
    return Config(
        data=DataConfig(**{name: value for name, value in keys.items() if name in of_data}),
        train=TrainConfig(**{name: value for name, value in keys.items() if name not in of_data}),
    )
