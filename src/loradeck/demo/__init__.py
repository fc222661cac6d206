"""What `loradeck demo` trains on: the same everyday questions, answered by a pirate and as one line of JSON.

`pirate.jsonl` and `json.jsonl` are datasets of prompts and completions; `prompts.json` are questions of neither.
"""
