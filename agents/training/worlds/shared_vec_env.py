"""Rows of one batch as SB3's ``VecEnv``: what is asked of each is asked of the whole, once."""

from typing import Any

from stable_baselines3.common.vec_env import VecEnv


class SharedVecEnv(VecEnv):
    """A ``VecEnv`` whose rows share one object: attributes and methods are its own."""

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The shared attribute, once per row asked for; None where there is none."""
        return [getattr(self, attr_name, None)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set a shared attribute."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Call a shared method once."""
        return [getattr(self, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Rows are never wrapped one by one."""
        return [False] * len(list(self._get_indices(indices)))
