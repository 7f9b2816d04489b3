"""`pocketvlm eval`: models asked a task's questions, and what came of it."""
