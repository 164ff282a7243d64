"""Small models that come with Dram, and the scripts that make them. Declares only: no torch at import."""
