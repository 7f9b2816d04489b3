"""Questions with answers, from the files and packages that people measure with."""
