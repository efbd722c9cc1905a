// A recording in the browser, and the tokens of one of its steps as elements. Knows nothing of pages: what is exported
// as a file of its own works with the same code (dgemma.studio.exports).

export const MOST_ENTROPY = 12.5;
const SETTLED = 0.1, LEANING = 0.7, VAGUE = 2.0; // nats, as in the terminal

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
export const nats = (byte) => (byte / 255) ** 2 * MOST_ENTROPY;
export const kept = (name, usual) => {
  try {
    return localStorage.getItem(`dgemma-canvas-${name}`) ?? usual;
  } catch { // a file that was opened may have no storage
    return usual;
  }
};
export const keep = (name, value) => {
  try {
    localStorage.setItem(`dgemma-canvas-${name}`, value);
  } catch {
    // then it is forgotten
  }
};

export class Film {
  // The canvases so far: each with its opening tokens and its frames, every frame whole.
  constructor() {
    this.canvases = [];
    this.texts = {};
    this.special = new Set();
  }

  learn({ texts, special }) {
    Object.assign(this.texts, texts);
    for (const id of special ?? []) this.special.add(id);
  }

  open(opening) {
    this.canvases[opening.canvas] = { ...opening, pinned: new Set(opening.pinned), frames: [] };
  }

  add(number, frame) {
    const canvas = this.canvases[number];
    const before = canvas.frames.at(-1);
    const ids = Int32Array.from(before ? before.ids : canvas.ids);
    for (const [place, id] of frame.ids) ids[place] = id;
    canvas.frames.push({ ...frame, ids, e: bytes(frame.e), f: bytes(frame.f) });
  }

  static whole(recording) {
    const film = new Film();
    film.learn(recording);
    for (const canvas of recording.canvases) {
      film.open(canvas);
      for (const frame of canvas.frames) film.add(canvas.canvas, frame);
    }
    return film;
  }

  moments() {
    return this.canvases.flatMap((canvas) => canvas.frames.map((_, index) => [canvas.canvas, index]));
  }

  hill(moments) {
    // The mean entropies as the path of an area, 100 wide and 24 high.
    const means = moments.map(([canvas, index]) => this.canvases[canvas].frames[index].mean);
    const most = Math.max(...means, 0.01), step = 100 / Math.max(means.length - 1, 1);
    return "M0,24" + means.map((mean, index) =>
      `L${(index * step).toFixed(2)},${(23 - 21 * Math.sqrt(mean / most)).toFixed(2)}`).join("") + "L100,24Z";
  }

  where(number, index) {
    const canvas = this.canvases[number], frame = canvas.frames[index];
    const several = this.canvases.length > 1 ? `canvas ${number + 1}/${this.canvases.length} · ` : "";
    const last = canvas.frames.at(-1).step;
    return `${several}step ${frame.step}/${last} · entropy ${frame.mean.toFixed(3)} · t ${frame.t.toFixed(2)}`;
  }

  told(id) {
    // A token in a line of text: blanks are seen.
    return (this.texts[id] ?? "").replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";
  }

  candidates(frame, place) {
    // The most probable tokens at a place, best first, or null if none were asked for.
    if (!frame.c) return null;
    frame.read ??= { ids: new Int32Array(bytes(frame.c.ids).buffer), p: bytes(frame.c.p) };
    return Array.from({ length: frame.c.n }, (_, rank) => {
      const at = place * frame.c.n + rank;
      return { text: this.told(frame.read.ids[at]), share: frame.read.p[at] / 255 };
    });
  }
}

export function pause(film, moments, at, speed) {
  // Milliseconds that a moment is shown for when it is played at a speed; "real": as long as it took.
  if (speed !== "real") return Math.min(600, Math.max(60, 6000 / moments.length)) / Number(speed);
  const frame = ([canvas, index]) => film.canvases[canvas].frames[index];
  const took = at + 1 < moments.length ? frame(moments[at + 1]).seconds - frame(moments[at]).seconds : 0;
  return Math.min(5000, Math.max(16, 1000 * took));
}

export const SPEEDS = [["0.25", "¼×"], ["0.5", "½×"], ["1", "1×"], ["2", "2×"], ["4", "4×"], ["real", "As it was"]];

export function spelling(film, id, sure, grid) {
  // A token as it is shown, and whether the line ends behind it.
  const raw = film.texts[id] ?? "", special = film.special.has(id);
  let text = special ? raw.replace(/[<>|]/g, "") : raw.replaceAll("\ufffd", "·");
  const breaks = !special && raw.includes("\n");
  if (breaks) text = sure && !grid ? text.replaceAll("\n", "↵\n") : text.replaceAll("\n", "↵");
  if (grid) text = text.trim() || (special ? text : "␣");
  return { text, special, breaks: breaks && sure };
}

export class Board {
  // The tokens of a canvas as elements in `body`, made once for a canvas and changed where they differ.
  constructor(body, stops) {
    this.body = body;
    this.stops = stops;
    this.cells = [];
    this.shown = null; // the film, canvas and step that are seen
    this.heat = kept("heat", "no") === "yes";
    this.layout = kept("layout", "flow");
  }

  paint(film, number, index) {
    const canvas = film.canvases[number], frame = canvas.frames[index] ?? null;
    const before = index > 0 ? canvas.frames[index - 1] : null;
    const ids = frame ? frame.ids : canvas.ids;
    this.shown = [film, number, index];
    this.ready(film, ids.length);
    let over = false;
    for (let place = 0; place < ids.length; place++) {
      const entropy = frame ? nats(frame.e[place]) : MOST_ENTROPY;
      const pinned = canvas.pinned.has(place);
      const sure = pinned || entropy <= LEANING;
      let look = pinned ? "pinned" : entropy <= SETTLED ? "settled" : entropy <= LEANING ? "leaning" : entropy <= VAGUE ? "vague" : "noise";
      if (over) look = "fill";
      else if (frame) {
        if (frame.f[place] & 1 && !(before && before.f[place] & 1)) look += " accepted";
        if (before && frame.f[place] & 2) look += " changed";
      }
      this.set(film, place, ids[place], look, sure, frame ? frame.e[place] : 255);
      if (sure && film.special.has(ids[place]) && this.stops.includes(film.texts[ids[place]])) over = true;
    }
  }

  ready(film, length) {
    if (this.cells.length === length) return;
    this.body.replaceChildren();
    this.cells = Array.from({ length }, (_, place) => {
      const element = document.createElement("span");
      element.dataset.place = place;
      this.body.append(element);
      return { element, text: null, look: null, heat: null, broken: null };
    });
    // Cells are as wide as most of what is spelt: the model's tokens decide.
    const lengths = Object.entries(film.texts).filter(([id]) => !film.special.has(Number(id)))
      .map(([, text]) => text.trim().length).sort((one, other) => one - other);
    const usual = lengths[Math.floor(0.93 * (lengths.length - 1))] ?? 6;
    this.body.style.setProperty("--cell", Math.min(9, Math.max(1, usual)));
  }

  set(film, place, id, look, sure, byte) {
    const cell = this.cells[place], grid = this.layout === "grid";
    const { text: spelt, special, breaks } = spelling(film, id, sure, grid);
    const text = look.startsWith("fill") && grid ? "·" : spelt;
    this.breakAfter(cell, breaks && grid);
    const name = `t ${look}${special ? " mark" : ""}`;
    if (cell.text !== text) cell.element.textContent = cell.text = text;
    if (cell.look !== name) cell.element.className = cell.look = name;
    if (this.heat && cell.heat !== byte) {
      cell.element.style.setProperty("--h", (byte / 255).toFixed(3));
      cell.heat = byte;
    }
  }

  breakAfter(cell, wanted) {
    if (Boolean(cell.broken) === wanted) return;
    if (wanted) cell.element.after((cell.broken = document.createElement("br")));
    else {
      cell.broken.remove();
      cell.broken = null;
    }
  }

  turn(name) {
    // Heat on or off, grid or flow: kept for the next time.
    if (name === "heat") this.heat = !this.heat;
    else this.layout = this.layout === "grid" ? "flow" : "grid";
    keep("heat", this.heat ? "yes" : "no");
    keep("layout", this.layout);
    for (const cell of this.cells) cell.text = cell.look = cell.heat = null;
    if (this.shown) this.paint(...this.shown);
  }

  mark(place) {
    for (const cell of this.cells) cell.element.classList.remove("chosen");
    if (place !== null) this.cells[place]?.element.classList.add("chosen");
  }
}
