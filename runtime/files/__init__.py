"""Files and what lies in them, with the standard library and numpy alone: all packages use it."""
