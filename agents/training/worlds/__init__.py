"""What agents train in: workloads, plants, episodes, rewards and prices."""
