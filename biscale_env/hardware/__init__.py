"""From the simulator to real GPUs.

Clocks, engine records, load, recording, an emulated engine, profiling.

Nothing else in the project imports this room. It needs the extra ``biscale-env[hw]``; every module
imports what it needs itself, so that the hooks inside a serving engine load no more than
``msgspec`` and ``pyzmq``.
"""
