"""A specification that can be written as JSON, for every environment class."""

from typing import TYPE_CHECKING

from biscale_env.envs.options import plain_options

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec


class PlainSpec:
    """Keeps Gymnasium's specification with configuration objects as plain mappings."""

    _spec: "EnvSpec | None" = None

    @property
    def spec(self) -> "EnvSpec | None":
        """Gymnasium's specification; options are plain, so that it can be written as JSON."""
        return self._spec

    @spec.setter
    def spec(self, value: "EnvSpec | None") -> None:
        if value is not None:
            value.kwargs = plain_options(value.kwargs)
        self._spec = value
