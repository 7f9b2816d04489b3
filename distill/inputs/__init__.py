"""Questions with pictures: read from any source, prepared by a checkpoint's own processor."""
