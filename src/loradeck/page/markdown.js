/** Markdown as elements. The text is a stranger's: no HTML, no pictures, and links to http and https only. */

import { element } from "./dom.js";

/** A character of the private use area; where it stands in a text, a mark is shown. */
export const MARK = "\uE000";

const MAX_DEPTH = 6; // of lists and quotes within each other; deeper ones are shown as they are written
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: {1,4}(?=\S)| +|$)/;
const DELIMITERS = /^[ \t]*\|?(?:[ \t]*:?-+:?[ \t]*\|)+(?:[ \t]*:?-+:?[ \t]*)?$/;

/**
 * @typedef {object} Block
 * @property {"paragraph" | "heading" | "code" | "rule" | "quote" | "table" | "list" | "item"} kind
 * @property {number} start the offset of its first line
 * @property {string[]} lines its content, without the marks of its kind; of a list, none
 * @property {number} [level] of a heading; the first number of an ordered list
 * @property {boolean} [ordered]
 * @property {Block[]} [items] of a list
 */

/** @typedef {{block: Block, source: string, element: HTMLElement, blocks?: Blocks}} Drawn */

/** An answer that grows; only its last two blocks are drawn again. */
export class MarkdownView {
  element = element("div", { class: "markdown" });
  #blocks = new Blocks(this.element, 0);
  #source = "";
  #settled = 0; // the offset from which on blocks may still change
  #offset = 0; // how many blocks are before it

  /**
   * Show a text; what it has in common with the one before stays as it is.
   * @param {string} source
   */
  set(source) {
    if (source === this.#source) return;
    if (!source.startsWith(this.#source)) this.#settled = this.#offset = 0;
    this.#source = source;
    const blocks = split(source.slice(this.#settled).split("\n"), 0);
    this.#blocks.set(blocks, this.#offset);
    const live = Math.max(0, blocks.length - 2); // an unfinished last line can still join the block before it
    this.#settled += blocks[live]?.start ?? 0;
    this.#offset += live;
  }
}

/** The blocks within one element. */
class Blocks {
  /** @type {Drawn[]} */
  #drawn = [];

  /**
   * @param {HTMLElement} parent
   * @param {number} depth
   */
  constructor(parent, depth) {
    this.parent = parent;
    this.depth = depth;
  }

  /**
   * Show these blocks after the first `offset`, which stay.
   * @param {Block[]} blocks
   * @param {number} [offset]
   */
  set(blocks, offset = 0) {
    for (const [index, block] of blocks.entries()) {
      const old = this.#drawn[offset + index];
      const drawn = old && grow(old, block) ? old : draw(block, this.depth);
      if (drawn === old) continue;
      if (old) old.element.replaceWith(drawn.element);
      else this.parent.append(drawn.element);
      this.#drawn[offset + index] = drawn;
    }
    for (const extra of this.#drawn.splice(offset + blocks.length)) extra.element.remove();
  }
}

/**
 * Let a drawn block become another one, if that needs no new element; return whether it did.
 * @param {Drawn} old
 * @param {Block} block
 */
function grow(old, block) {
  const { kind, ordered, level } = old.block;
  if (kind !== block.kind || ordered !== block.ordered || level !== block.level) return false;
  const source = block.lines.join("\n");
  if (block.items) {
    old.blocks?.set(block.items);
  } else if (source !== old.source) {
    if (old.blocks) old.blocks.set(split(block.lines, old.blocks.depth));
    else if (kind !== "code" || !source.startsWith(old.source)) return false;
    else old.element.firstElementChild?.append(...textNodes(source.slice(old.source.length)));
  }
  old.block = block;
  old.source = source;
  return true;
}

/**
 * @param {Block} block
 * @param {number} depth
 * @returns {Drawn}
 */
function draw(block, depth) {
  const source = block.lines.join("\n");
  /** @param {HTMLElement} parent @param {Block[]} inner */
  const holder = (parent, inner) => {
    const blocks = new Blocks(parent, depth + 1);
    blocks.set(inner);
    return { block, source, element: parent, blocks };
  };
  switch (block.kind) {
    case "heading": {
      const tag = /** @type {"h3"} */ (`h${Math.min(6, (block.level ?? 1) + 2)}`); // below the page's own
      return { block, source, element: element(tag, {}, inline(source)) };
    }
    case "code":
      return { block, source, element: element("pre", { tabIndex: 0 }, element("code", {}, ...textNodes(source))) };
    case "rule":
      return { block, source, element: element("hr") };
    case "table":
      return { block, source, element: table(block.lines) };
    case "quote":
      return holder(element("blockquote"), split(block.lines, depth + 1));
    case "item":
      return holder(element("li"), split(block.lines, depth + 1));
    case "list": {
      const list = block.ordered ? element("ol", { start: block.level }) : element("ul");
      return holder(list, block.items ?? []);
    }
    default:
      return { block, source, element: element("p", {}, inline(source)) };
  }
}

/** @param {string[]} lines */
function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  const body = rows.map((row) =>
    element("tr", {}, ...head.map((_, index) => element("td", {}, inline(row[index] ?? "")))),
  );
  return element(
    "div",
    { class: "scroll", tabIndex: 0, role: "group", "aria-label": "Table" },
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...head.map((cell) => element("th", {}, inline(cell))))),
      element("tbody", {}, ...body),
    ),
  );
}

/** @param {string} line */
function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// ---- from lines to blocks

/**
 * @param {string[]} lines
 * @param {number} depth
 * @returns {Block[]}
 */
function split(lines, depth) {
  /** @type {Block[]} */
  const blocks = [];
  let offset = 0;
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (line.trim()) {
      const { block, end } = read(lines, at, depth);
      blocks.push({ ...block, start: offset });
      while (at < end) offset += lines[at++].length + 1;
    } else {
      offset += line.length + 1;
      at += 1;
    }
  }
  return blocks;
}

/**
 * Return the block that begins at a line, and where it ends.
 * @param {string[]} lines
 * @param {number} at
 * @param {number} depth
 * @returns {{block: Omit<Block, "start">, end: number}}
 */
function read(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readCode(lines, at, fence[1]);
  const heading = HEADING.exec(line);
  if (heading) return { block: { kind: "heading", lines: [heading[2].trim().replace(/\s#+$/, "")], level: heading[1].length }, end: at + 1 };
  if (RULE.test(line)) return { block: { kind: "rule", lines: [] }, end: at + 1 };
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, at);
  if (isTable(lines, at)) {
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end += 1;
    return { block: { kind: "table", lines: lines.slice(at, end) }, end };
  }
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !isTable(lines, end)) {
    if (depth < MAX_DEPTH && beginsBlock(lines[end])) break;
    end += 1;
  }
  return { block: { kind: "paragraph", lines: lines.slice(at, end) }, end };
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @param {string} marks
 * @returns {{block: Omit<Block, "start">, end: number}}
 */
function readCode(lines, at, marks) {
  let end = at + 1;
  const isEnd = (/** @type {string} */ line) => {
    const text = line.trim();
    return text.length >= marks.length && text === marks[0].repeat(text.length);
  };
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  return { block: { kind: "code", lines: lines.slice(at + 1, end) }, end: Math.min(end + 1, lines.length) };
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {{block: Omit<Block, "start">, end: number}}
 */
function readQuote(lines, at) {
  const inner = [];
  let end = at;
  for (; end < lines.length && lines[end].trim(); end += 1) {
    if (!QUOTE.test(lines[end]) && beginsBlock(lines[end])) break;
    inner.push(lines[end].replace(QUOTE, ""));
  }
  return { block: { kind: "quote", lines: inner }, end };
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {{block: Omit<Block, "start">, end: number}}
 */
function readList(lines, at) {
  const [, , marker] = /** @type {RegExpExecArray} */ (ITEM.exec(lines[at]));
  const kind = marker.at(-1); // "1." and "1)" are of different lists, as "-" and "*" are
  /** @type {Block[]} */
  const items = [];
  let indent = 0;
  let width = 0;
  let end = at;
  for (; end < lines.length; end += 1) {
    const line = lines[end].replace(/^\t+/, (tabs) => "    ".repeat(tabs.length));
    const inner = items.at(-1)?.lines;
    const leading = line.length - line.trimStart().length;
    const item = ITEM.exec(line);
    if (inner && !line.trim()) {
      inner.push("");
    } else if (inner && leading >= Math.min(width, indent + 2)) {
      inner.push(line.slice(Math.min(leading, width)));
    } else if (item && item[2].at(-1) === kind && !RULE.test(line)) {
      indent = item[1].length;
      width = item[0].length;
      items.push({ kind: "item", start: 0, lines: [line.slice(width)] });
    } else if (inner && inner.at(-1) !== "" && line.trim() && !beginsBlock(line)) {
      inner.push(line.trimStart()); // a paragraph goes on without indentation
    } else {
      break;
    }
  }
  const ordered = marker.length > 1;
  return { block: { kind: "list", lines: [], items, ordered, level: ordered ? parseInt(marker, 10) : undefined }, end };
}

/**
 * Return whether a line ends a paragraph before it. A number does only if it is 1, for years at the start of a line.
 * @param {string} line
 */
function beginsBlock(line) {
  const item = ITEM.exec(line);
  const isItem = item && item[0].length < line.length && (item[2].length === 1 || parseInt(item[2], 10) === 1);
  return Boolean(isItem) || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

/**
 * @param {string[]} lines
 * @param {number} at
 */
function isTable(lines, at) {
  const next = lines[at + 1];
  return Boolean(
    next && lines[at].includes("|") && DELIMITERS.test(next) && cells(lines[at]).length === cells(next).length,
  );
}

// ---- from text to inline elements

const SPECIAL = /[\\`*_~[!<]|https?:\/\//g;
const LINK = /!?\[((?:[^[\]\\\n]|\\.)*)\]\([ \t]*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:[ \t]+"[^"\n]*")?[ \t]*\)/y;
const AUTOLINK = /<(https?:\/\/[^\s<>]+)>/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*|]{1,2000}/y;
const ALNUM = /[\p{L}\p{N}]/u;
const MAX_OPEN = 16; // emphasis within emphasis

/** @typedef {{mark: string, nodes: Node[]}} Frame */

/**
 * Return a text with its code, emphasis and links as elements.
 * @param {string} text
 * @param {boolean} [links] whether links become links; there are none within a link
 * @returns {DocumentFragment}
 */
export function inline(text, links = true) {
  /** @type {Frame[]} */
  const frames = [{ mark: "", nodes: [] }];
  /** @type {Set<number>} */
  const unclosed = new Set(); // lengths of runs of backticks that have no end
  const add = (/** @type {Node[]} */ ...nodes) => /** @type {Frame} */ (frames.at(-1)).nodes.push(...nodes);
  let at = 0; // what is before it has been added
  let from = 0;
  for (;;) {
    SPECIAL.lastIndex = from;
    const match = SPECIAL.exec(text);
    if (!match) break;
    const start = match.index;
    const special = specialAt(text, start, links, unclosed);
    if (special === null) {
      from = start + match[0].length;
      continue;
    }
    if (start > at) add(...textNodes(text.slice(at, start)));
    if (special.run) emphasise(frames, text, start, special.end);
    else add(...special.nodes);
    at = from = special.end;
  }
  add(...textNodes(text.slice(at)));
  const all = document.createDocumentFragment();
  for (const { mark, nodes } of frames) all.append(mark, ...nodes);
  return all;
}

/**
 * Return what stands at a special character, and where it ends; null if it is just a character.
 * @param {string} text
 * @param {number} start
 * @param {boolean} links
 * @param {Set<number>} unclosed
 * @returns {{nodes: Node[], end: number, run?: boolean} | null}
 */
function specialAt(text, start, links, unclosed) {
  const character = text[start];
  if (character === "\\") {
    const next = text[start + 1];
    return next && /[!-/:-@[-`{-~\n]/.test(next) ? { nodes: textNodes(next), end: start + 2 } : null;
  }
  if (character === "`") return code(text, start, unclosed);
  if (character === "[" || character === "!") {
    const [all, label, href] = match(LINK, text, start) ?? [];
    if (all === undefined || !links) return null;
    return { nodes: [link(href, inline(label || href, false))], end: start + all.length };
  }
  if (character === "<") {
    const [all, href] = match(AUTOLINK, text, start) ?? [];
    return all && links ? { nodes: [link(href, ...textNodes(href))], end: start + all.length } : null;
  }
  if (character === "h") {
    const href = match(ADDRESS, text, start)?.[0].replace(/[.,;:!?)\]}_~]+$/, "");
    if (!href || !links || ALNUM.test(text[start - 1] ?? "")) return null;
    return { nodes: [link(href, ...textNodes(href))], end: start + href.length };
  }
  let end = start + 1;
  while (text[end] === character) end += 1;
  return { nodes: [], end, run: true };
}

/**
 * @param {string} text
 * @param {number} start
 * @param {Set<number>} unclosed
 */
function code(text, start, unclosed) {
  let open = start;
  while (text[open] === "`") open += 1;
  const length = open - start;
  for (let close = open; !unclosed.has(length); ) {
    close = text.indexOf("`", close);
    if (close < 0) break;
    let end = close;
    while (text[end] === "`") end += 1;
    if (end - close === length) {
      const inner = text.slice(open, close).replace(/^ (.*\S.*) $/s, "$1");
      return { nodes: [element("code", {}, ...textNodes(inner))], end };
    }
    close = end;
  }
  unclosed.add(length);
  return { nodes: textNodes(text.slice(start, open)), end: open };
}

/**
 * Open or close emphasis at a run of `*`, `_` or `~`.
 * @param {Frame[]} frames
 * @param {string} text
 * @param {number} start
 * @param {number} end
 */
function emphasise(frames, text, start, end) {
  const character = text[start];
  const before = text[text[start - 1] === MARK ? start - 2 : start - 1] ?? " ";
  const after = text[text[end] === MARK ? end + 1 : end] ?? " ";
  const within = character === "_" && ALNUM.test(before) && ALNUM.test(after);
  const opens = /\S/.test(after) && !within;
  const closes = /\S/.test(before) && !within;
  let rest = end - start;
  while (rest > 0) {
    const size = rest >= 2 ? 2 : 1;
    const find = (/** @type {(length: number) => boolean} */ fits) =>
      frames.findLastIndex(({ mark }) => mark[0] === character && fits(mark.length));
    let open = closes ? find((length) => length === rest) : -1;
    if (closes && open < 0) open = find((length) => length <= rest);
    if (open > 0) {
      const [frame, ...above] = frames.splice(open);
      for (const { mark, nodes } of above) frame.nodes.push(...textNodes(mark), ...nodes);
      const tag = character === "~" ? "s" : frame.mark.length === 2 ? "strong" : "em";
      /** @type {Frame} */ (frames.at(-1)).nodes.push(element(tag, {}, ...frame.nodes));
      rest -= frame.mark.length;
    } else if (opens && end - start <= 3 && frames.length < MAX_OPEN && (character !== "~" || size === 2)) {
      frames.push({ mark: character.repeat(size), nodes: [] });
      rest -= size;
    } else {
      /** @type {Frame} */ (frames.at(-1)).nodes.push(...textNodes(character.repeat(rest)));
      rest = 0;
    }
  }
}

/**
 * @param {string} href
 * @param {...(Node | string)} children
 */
function link(href, ...children) {
  const address = href.replaceAll(MARK, "");
  if (!/^https?:\/\//i.test(address)) return element("span", { title: address }, ...children);
  return element("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, ...children);
}

/**
 * @param {RegExp} pattern a sticky one
 * @param {string} text
 * @param {number} index
 */
function match(pattern, text, index) {
  pattern.lastIndex = index;
  return pattern.exec(text);
}

/**
 * Return a text as nodes, with the mark where it has one.
 * @param {string} text
 * @returns {Node[]}
 */
function textNodes(text) {
  return text.split(MARK).flatMap((part, index) => {
    const node = part ? [document.createTextNode(part)] : [];
    return index ? [element("span", { class: "parting", role: "img", "aria-label": "parts here" }), ...node] : node;
  });
}
