"""The datasets of `loradeck demo`: the same everyday questions, answered by a pirate and as one line of JSON.

`pirate.jsonl` and `json.jsonl` hold prompts and completions; `prompts.json` holds questions that are in neither.
"""
