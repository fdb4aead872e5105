"""Room: teacher."""
