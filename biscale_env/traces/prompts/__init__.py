"""What prompts share: sessions and block hashes, out of files and in a trace."""
