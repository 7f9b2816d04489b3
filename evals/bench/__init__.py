"""`pocketvlm bench`: what bundles cost on a device, and what device that was."""
