"""Room: students."""
