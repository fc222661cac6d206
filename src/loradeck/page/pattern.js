/** Patterns of names, as the server's keys file has them: `*`, `?`, `[abc]` and `[!abc]`. */

/**
 * Return whether a name matches one of these patterns.
 * @param {string} name
 * @param {string[]} patterns
 */
export function matches(name, patterns) {
  return patterns.some((pattern) => expression(pattern).test(name));
}

/** @param {string} pattern */
function expression(pattern) {
  const source = pattern.replace(/\[(!?)(\][^\]]*|[^\]]+)\]|[\s\S]/gu, (part, not, characters) => {
    if (characters) return `[${not ? "^" : ""}${characters.replace(/[\\^[\]]/g, "\\$&")}]`;
    if (part === "*") return "[\\s\\S]*";
    if (part === "?") return "[\\s\\S]";
    return part.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  });
  return new RegExp(`^${source}$`, "u");
}
