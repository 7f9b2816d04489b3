"""`pocketvlm bench --on`: the same bench on a device behind ssh or adb."""
