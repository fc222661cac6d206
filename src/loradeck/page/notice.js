/** Short notices in a corner of the page: what was done, with a way back, and what failed. */

import { button, element } from "./dom.js";

const SECONDS = 10;

/**
 * Show a notice for ten seconds.
 * @param {string} text
 * @param {{action?: string, onAction?: () => void, onEnd?: () => void}} [options] a button, and what happens once the
 *   notice is gone without it
 */
export function notify(text, { action, onAction, onEnd } = {}) {
  const end = () => {
    clearTimeout(timer);
    notice.remove();
    onEnd?.();
  };
  const timer = setTimeout(end, SECONDS * 1000);
  const act = () => {
    onEnd = undefined;
    end();
    onAction?.();
  };
  const notice = element("div", { class: "notice" }, element("span", {}, text), action && button(action, act), close(end));
  show(notice);
}

/**
 * Show an error until it is closed. An AbortError, of what the user stopped, is not shown.
 * @param {unknown} error
 * @param {string} [what] what failed
 */
export function notifyError(error, what = "") {
  if (error instanceof Error && error.name === "AbortError") return;
  const text = error instanceof Error ? error.message : String(error);
  const notice = element(
    "div",
    { class: "notice error", role: "alert" },
    element("span", {}, what ? `${what}: ${text}` : text),
    close(() => notice.remove()),
  );
  show(notice);
}

/** @param {() => void} onclick */
function close(onclick) {
  return button("×", onclick, { class: "quiet", "aria-label": "Close" });
}

/** @param {HTMLElement} notice */
function show(notice) {
  const place = /** @type {HTMLElement} */ (document.getElementById("notices"));
  while (place.childElementCount >= 5) place.firstElementChild?.remove();
  place.append(notice);
}
