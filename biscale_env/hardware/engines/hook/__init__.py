"""What runs inside a serving engine: records of its iterations, and the plug-ins that send them.

Pyzmq, msgspec and the standard library only, and relative imports only: the same files are the
package ``biscale_hook`` of the distribution ``biscale-engine-hook`` (``packaging/engine-hook``),
which goes into an engine's environment without the rest of this project.
"""
