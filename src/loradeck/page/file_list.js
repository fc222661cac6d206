/** The files that were uploaded: dropped, checked, or deleted. */

import * as address from "./address.js";
import { get, remove, upload } from "./api.js";
import { button, element, replace } from "./dom.js";
import { fileDrop } from "./file_drop.js";
import { ago, size } from "./format.js";
import { notifyError } from "./notice.js";

/**
 * Return the files of this key, with a place to drop more.
 * @returns {{element: HTMLElement, refresh: () => Promise<void>}}
 */
export function fileList() {
  const state = element("div", { class: "stack" });
  const list = element("ul", { class: "files", "aria-label": "Uploaded files" });

  async function refresh() {
    /** @type {{data: import("./dataset.js").FileRecord[]}} */
    const { data } = await get("v1/files?purpose=fine-tune");
    replace(list, ...data.map(entry));
  }

  /** @param {import("./dataset.js").FileRecord} file */
  function entry({ id, filename, bytes, created_at }) {
    const discard = async () => {
      try {
        await remove(`v1/files/${id}`);
        await refresh();
      } catch (error) {
        notifyError(error, "The file cannot be deleted");
      }
    };
    return element(
      "li",
      { class: "row" },
      element("a", { class: "text", href: address.link("train", { file: id }) }, filename),
      element("span", { class: "muted" }, `${size(bytes)}, ${ago(created_at)}`),
      button("Delete", discard, { class: "quiet danger", "aria-label": `Delete ${filename}` }),
    );
  }

  /** @param {import("./file_drop.js").DroppedFile[]} files */
  async function send(files) {
    let id = "";
    replace(state);
    for (const { path, file } of files) {
      const stopping = new AbortController();
      const bar = element("progress", { max: 1, value: 0, "aria-label": `Upload of ${path}` });
      const row = element(
        "div",
        { class: "row" },
        element("span", { class: "text" }, path),
        bar,
        button("Stop", () => stopping.abort()),
      );
      state.append(row);
      const form = new FormData();
      form.append("purpose", "fine-tune");
      form.append("file", file, file.name);
      try {
        const onProgress = (/** @type {number} */ share) => (bar.value = share);
        ({ id } = await upload("v1/files", form, onProgress, stopping.signal));
        row.remove();
      } catch (error) {
        const message = /** @type {Error} */ (error).message;
        const text = message.includes(file.name) ? message : `${path}: ${message}`;
        replace(row, element("p", { class: "error text", role: "alert" }, text));
      }
    }
    await refresh().catch(notifyError);
    if (id && files.length === 1 && state.isConnected) location.hash = address.link("train", { file: id });
  }

  const label = "Drop a dataset here: JSON lines, JSON, CSV, TSV or Parquet";
  const drop = fileDrop({ label, multiple: true, onFiles: send });
  return { element: element("section", { class: "stack", "aria-label": "Datasets" }, drop, state, list), refresh };
}
