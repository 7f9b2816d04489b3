"""Who answers and who judges: models of this process or servers; the pool on disk."""
