"""What a person sees of an environment: the last seconds, as text or as a picture."""
