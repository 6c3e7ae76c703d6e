"""BiScale-Bench: frozen tasks, score cards, the leaderboard."""
