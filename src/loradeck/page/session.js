/** What this tab knows of its server: what its key may do, and the models that can be asked. */

import { get } from "./api.js";

/**
 * What a key may do: the answer of `GET /v1/key`.
 * @typedef {object} Rights
 * @property {string} name of the key; "" without keys
 * @property {boolean} required whether the server has keys
 * @property {string} base
 * @property {string} task the base's: `generate`, `classify`, …
 * @property {boolean} control whether it may load, publish and remove adapters and read the metrics
 * @property {boolean} train whether it may upload files and train
 * @property {boolean} store whether the server has a store of adapters
 * @property {string[]} adapters patterns of the names that it may use
 * @property {string[]} create patterns of the names that it may create
 */

/**
 * A model of `GET /v1/models`; the base has no `adapter`.
 * @typedef {object} Model
 * @property {string} id
 * @property {number} created
 * @property {string} root
 * @property {string | null} parent
 * @property {number} max_model_len
 * @property {{rank: number, alpha: number, targets: string[], bytes: number, sha256: string | null, version: number,
 *   loaded: boolean, tier: "device" | "memory" | "disk", pinned: boolean, last_used: number | null}} [adapter]
 */

/** The state; listeners of `rights` and `models` hear when it changes. */
class Session extends EventTarget {
  /** @type {Rights | null} */
  rights = null;
  /** @type {Model[]} */
  models = [];

  /**
   * Ask the server what the key may do.
   * @throws {import("./api.js").ApiError}
   */
  async open() {
    this.rights = await get("v1/key");
    this.dispatchEvent(new Event("rights"));
    await this.refreshModels();
  }

  /** Ask the server for its models. */
  async refreshModels() {
    this.models = (await get("v1/models")).data;
    this.dispatchEvent(new Event("models"));
  }

  /** The adapters among the models. */
  get adapters() {
    return this.models.filter((model) => model.adapter);
  }

  /** @returns {string} */
  get base() {
    return this.rights?.base ?? "";
  }
}

export const session = new Session();
