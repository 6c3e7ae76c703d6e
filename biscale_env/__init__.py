"""Environments, models and evaluation of energy control in disaggregated LLM serving.

Importing the package registers the Gymnasium ids ``BiScale/Prefill-v1``, ``BiScale/Decode-v1`` and
their discrete twins; everything heavy is imported when it is used.
"""

from biscale_env.envs.registration import register_envs

__version__ = "0.2.0.dev0"
register_envs()
