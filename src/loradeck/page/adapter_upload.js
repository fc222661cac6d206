/** The form that uploads an adapter: PEFT's folder, as files or as a zip. */

import { upload } from "./api.js";
import { button, element, replace } from "./dom.js";
import { fileDrop } from "./file_drop.js";
import { count, size } from "./format.js";
import { nameInput, validName } from "./name_input.js";
import { refusal } from "./refusal.js";

/** @typedef {{path: string, file: File}} Part */

const LISTED = 12; // files that are listed by name

/**
 * Return the form.
 * @param {(model: import("./session.js").Model) => void} onPublished called with what the server made of it
 */
export function adapterUpload(onPublished) {
  /** @type {Part[]} */
  let parts = [];
  let suggestion = "";
  /** @type {AbortController | undefined} */
  let sending;
  const name = nameInput("Name");
  const list = element("div", { class: "upload-files" });
  const bar = element("progress", { max: 1, value: 0, "aria-label": "Sent" });
  const phase = element("span", { role: "status" });
  const stop = button("Stop", () => sending?.abort());
  const progress = element("div", { class: "row", hidden: true }, bar, phase, stop);
  const send = element("button", { class: "primary", disabled: true }, "Upload");
  const problems = element("div");
  const drop = fileDrop({
    label: "Drop an adapter here: PEFT's folder, its files, or a zip of it",
    multiple: true,
    folders: true,
    onFiles: take,
  });
  const form = element("form", { class: "stack", onsubmit: submit }, drop, list, name.element);
  form.append(element("div", { class: "row" }, send), progress, problems);

  /** @param {Part[]} files */
  function take(files) {
    parts = files.filter(({ path }) => !path.split("/").some((part) => part.startsWith(".") || part === "__MACOSX"));
    const bytes = parts.reduce((sum, { file }) => sum + file.size, 0);
    const lines = parts.slice(0, LISTED).map(({ path, file }) => element("li", {}, `${path} · ${size(file.size)}`));
    const more = parts.length - LISTED;
    replace(
      list,
      element("p", {}, `${count(parts.length)} ${parts.length === 1 ? "file" : "files"}, ${size(bytes)}`),
      element("ul", { class: "text" }, ...lines, more > 0 && element("li", {}, `and ${count(more)} more`)),
    );
    replace(problems);
    send.disabled = !parts.length;
    if (name.input.value === suggestion) name.input.value = suggestion = nameOf(parts);
    name.check();
  }

  /** @param {SubmitEvent} event */
  async function submit(event) {
    event.preventDefault();
    const body = new FormData();
    body.append("name", name.input.value);
    for (const { path, file } of parts) body.append("file", file, path);
    sending = new AbortController();
    setSending(true);
    try {
      onPublished(await upload("v1/adapters", body, showShare, sending.signal));
    } catch (error) {
      if (!(error instanceof DOMException)) replace(problems, refusal(error));
    }
    setSending(false);
  }

  /** @param {boolean} isSending */
  function setSending(isSending) {
    progress.hidden = !isSending;
    send.disabled = isSending;
    bar.value = 0;
    replace(phase, isSending ? "Sending…" : "");
    if (isSending) replace(problems);
  }

  /** @param {number} share */
  function showShare(share) {
    bar.value = share;
    if (share === 1) replace(phase, "Checking and loading it…");
  }
  return form;
}

/**
 * Return the name that an adapter's folder or zip gives it; "" if it has none.
 * @param {Part[]} parts
 */
function nameOf(parts) {
  const paths = parts.map(({ path }) => path.split("/"));
  if (parts.length === 1 && /\.zip$/i.test(parts[0].path)) return validName(parts[0].file.name.slice(0, -4));
  const folder = paths.find((path) => path.at(-1) === "adapter_config.json")?.at(-2) ?? "";
  return validName(folder.split("@")[0]);
}
