"""The trainer's features, action and reward as Gymnasium wrappers of the public environments."""

from agents.wrappers.agent_env import agent_env, save_agent
from agents.wrappers.agent_features import AgentFeatures, RuleAction
from agents.wrappers.training_reward import TrainingReward

__all__ = ["AgentFeatures", "RuleAction", "TrainingReward", "agent_env", "save_agent"]
