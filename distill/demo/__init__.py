"""The demo: from nothing to trained students on easy-VQA."""
