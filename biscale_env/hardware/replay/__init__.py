"""A trace against an engine under control: load, recording, records, validation."""
