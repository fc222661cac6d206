/** Adapters that are to be removed. For ten seconds there is a way back; only then is the server asked. */

import { remove } from "./api.js";
import { notify, notifyError } from "./notice.js";
import { session } from "./session.js";

/** What is about to be removed; listeners of `change` hear when that changes. Leaving the page removes nothing. */
class Removal extends EventTarget {
  /** @type {Set<string>} */
  #ids = new Set();

  /**
   * Return whether an adapter, or a version of it, is about to be removed.
   * @param {string} id such as `poet`, for all its versions, or `poet@2`
   */
  has(id) {
    return this.#ids.has(id) || this.#ids.has(id.split("@")[0]);
  }

  /**
   * Remove an adapter or a version in ten seconds, unless the user undoes it.
   * @param {string} id
   * @param {string} what what it is, for people
   */
  start(id, what) {
    if (this.#ids.has(id)) return;
    this.#ids.add(id);
    this.#change();
    notify(`${what} will be removed.`, { action: "Undo", onAction: () => this.#end(id), onEnd: () => this.#send(id) });
  }

  /** @param {string} id */
  async #send(id) {
    try {
      await remove(`v1/models/${encodeURIComponent(id)}`);
      await session.refreshModels();
    } catch (error) {
      notifyError(error, `${id} was not removed`);
    }
    this.#end(id);
  }

  /** @param {string} id */
  #end(id) {
    this.#ids.delete(id);
    this.#change();
  }

  #change() {
    this.dispatchEvent(new Event("change"));
  }
}

export const removal = new Removal();
