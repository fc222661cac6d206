/** The page's state in the URL's fragment, `#view=JSON`, so that a link shows what its sender sees. */

/**
 * Return the view that the URL names, and its state; "" and null if it names none. `isDamaged` is a state that cannot
 * be read.
 * @returns {{view: string, state: any, isDamaged: boolean}}
 */
export function read() {
  const [view, text] = split(location.hash.slice(1));
  try {
    return { view, state: text ? JSON.parse(decodeURIComponent(text)) : null, isDamaged: false };
  } catch {
    return { view, state: null, isDamaged: true };
  }
}

/**
 * Write a view and its state into the URL, without an entry in the browser's history.
 * @param {string} view
 * @param {any} [state]
 */
export function write(view, state) {
  history.replaceState(null, "", link(view, state));
}

/**
 * Return the fragment that shows a view in a state.
 * @param {string} view
 * @param {any} [state]
 */
export function link(view, state) {
  return state ? `#${view}=${encodeURIComponent(JSON.stringify(state))}` : `#${view}`;
}

/** @param {string} fragment */
function split(fragment) {
  const at = fragment.indexOf("=");
  return at < 0 ? [fragment, ""] : [fragment.slice(0, at), fragment.slice(at + 1)];
}
