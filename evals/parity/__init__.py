"""How near a bundle's numbers are to its checkpoint's."""
