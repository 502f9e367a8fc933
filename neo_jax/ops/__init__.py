"""Pure functions with a form for each platform: nothing above them asks where it runs."""
