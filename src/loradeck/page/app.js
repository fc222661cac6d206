/** The page: its views, which of them is shown, and whether the server answers. */

import * as address from "./address.js";
import { connection, key, watchConnection } from "./api.js";
import { element, replace } from "./dom.js";
import { askForKey } from "./key.js";
import { notify, notifyError } from "./notice.js";
import { session } from "./session.js";

/**
 * One of the page's views. Its module exports `create`, which returns it; it is loaded when it is first shown.
 * @typedef {object} View
 * @property {HTMLElement} element
 * @property {(state: any) => void} show called each time it is shown; null: as it was
 * @property {() => void} [hide] called when another view is shown
 */

/**
 * @type {Record<string, {title: string, load: () => Promise<{create: () => View}>,
 *   offered: (rights: import("./session.js").Rights) => boolean}>}
 */
const VIEWS = {
  compare: { title: "Compare", load: () => import("./compare.js"), offered: (rights) => rights.task === "generate" },
  adapters: { title: "Adapters", load: () => import("./adapters.js"), offered: (rights) => rights.store },
  train: { title: "Train", load: () => import("./train.js"), offered: (rights) => rights.train },
  server: { title: "Server", load: () => import("./server.js"), offered: (rights) => rights.control },
};

const nav = at("views");
const main = at("main");
const server = at("server");
const keyButton = at("key");
/** @type {Map<string, View>} */
const created = new Map();
/** @type {View | undefined} */
let shown;

/** @param {string} id */
function at(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

async function open() {
  try {
    await session.open();
  } catch (error) {
    if (!connection.online) return; // `change` opens it when the server is back
    if (key.value || /** @type {any} */ (error).status !== 401) notifyError(error);
    return;
  }
  await showAddress();
  // From now on the metrics are read, whichever view is shown. If the server is gone by now, it is opened again later.
  if (session.rights?.control) await import("./metrics.js").catch(() => {});
}

function offered() {
  const rights = session.rights;
  return rights ? Object.keys(VIEWS).filter((name) => VIEWS[name].offered(rights)) : [];
}

async function showAddress() {
  const names = offered();
  const { view, state, isDamaged } = address.read();
  const name = names.includes(view) ? view : names[0];
  if (!name) {
    replace(main, element("p", { class: "empty" }, "This API key may use nothing that the page shows."));
    return;
  }
  drawNav(names, name);
  try {
    if (!created.has(name)) created.set(name, (await VIEWS[name].load()).create());
  } catch (error) {
    notifyError(error, `The view ${VIEWS[name].title} cannot be shown`);
    return;
  }
  if (address.read().view !== view) return; // another was asked for while this one was loaded
  const next = /** @type {View} */ (created.get(name));
  if (next !== shown) {
    shown?.hide?.();
    shown = next;
    replace(main, next.element);
  }
  document.title = `${VIEWS[name].title} · ${session.base} · loradeck`;
  next.show(name === view ? state : null);
  if (isDamaged) notify("The link is damaged, perhaps cut short: what it was to show cannot be read.");
}

/**
 * @param {string[]} names
 * @param {string} current
 */
function drawNav(names, current) {
  const links = names.map((name) =>
    element("a", { href: `#${name}`, "aria-current": name === current ? "page" : null }, VIEWS[name].title),
  );
  replace(nav, ...links);
}

function drawServer() {
  server.classList.toggle("gone", !connection.online);
  const rights = session.rights;
  const text = rights ? `${rights.base}${rights.name && ` · key ${rights.name}`}` : "";
  replace(server, connection.online ? text : "The server does not answer; looking for it…");
  keyButton.hidden = !rights?.required;
}

async function changeKey() {
  if (await askForKey()) location.reload(); // what was on the page may be another key's
}

keyButton.addEventListener("click", changeKey);
session.addEventListener("rights", drawServer);
connection.addEventListener("key", changeKey);
connection.addEventListener("change", () => {
  drawServer();
  if (connection.online) open();
});
window.addEventListener("hashchange", showAddress);
watchConnection();
open();
