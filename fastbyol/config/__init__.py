"""What a run is, as frozen values that are checked where they are built. Standard library only."""
