// The live canvas: one answer's tokens, each in its place, while they are denoised, and again step by step after that.
//
// The server pushes openings and frames (dgemma.studio.recording says what is in them); when the answer is over, all of
// them are fetched from `src`. Tokens are plain elements that are made once for a canvas and changed where they differ.

const MOST_ENTROPY = 12.5;
const SETTLED = 0.1, LEANING = 0.7, VAGUE = 2.0; // nats, as in the terminal
const PACE = 90; // milliseconds that a step is shown for, unless others wait
const MOST_WAITING = 12; // steps; older ones are left out

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const nats = (byte) => (byte / 255) ** 2 * MOST_ENTROPY;
const kept = (name, usual) => localStorage.getItem(`dgemma-canvas-${name}`) ?? usual;
const keep = (name, value) => localStorage.setItem(`dgemma-canvas-${name}`, value);

class Film {
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
}

export default {
  template: `
    <section class="cv" :class="[layout, { heat, live }]" v-show="live || available">
      <div class="cv-bar">
        <button v-if="!live" class="cv-button cv-replay" type="button" @click="toggle" :aria-expanded="open">
          <i class="q-icon material-icons" aria-hidden="true">{{ open ? 'expand_less' : 'movie_filter' }}</i>
          {{ open ? 'Close' : 'Replay' }}</button>
        <span v-if="live" class="cv-pulse" aria-hidden="true"></span>
        <span class="cv-status" :role="live ? 'status' : null">{{ status }}</span>
        <span class="cv-space"></span>
        <template v-if="live || open">
          <button class="cv-button" type="button" @click="setHeat" :aria-pressed="heat"
                  title="Colour every token by its entropy">Heat</button>
          <button class="cv-button" type="button" @click="setLayout" :aria-pressed="layout === 'grid'"
                  title="Show tokens in cells of one size">Grid</button>
        </template>
      </div>
      <div v-show="live || open" class="cv-body" ref="body" @mouseover="hover" @click="choose"></div>
      <div v-if="open && !live && count" class="cv-scrub">
        <button class="cv-button cv-round" type="button" @click="play" :aria-label="playing ? 'Pause' : 'Play'">
          <i class="q-icon material-icons" aria-hidden="true">{{ playing ? 'pause' : 'play_arrow' }}</i></button>
        <div class="cv-track">
          <svg class="cv-spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
            <path :d="area"></path></svg>
          <input type="range" min="0" :max="count - 1" v-model.number="at" @input="seek" aria-label="Step"
                 :aria-valuetext="where">
        </div>
        <span class="cv-where">{{ where }}</span>
      </div>
      <div v-if="life && open && !live" class="cv-life">
        <div class="cv-life-head"><b>Position {{ life.place + 1 }}</b>
          <span>{{ life.pinned ? 'pinned' : 'entropy by step, in nats' }}</span><span class="cv-space"></span>
          <button class="cv-button cv-round" type="button" @click="life = null" aria-label="Close">
            <i class="q-icon material-icons" aria-hidden="true">close</i></button></div>
        <div class="cv-bars"><button v-for="bar in life.bars" type="button" class="cv-step"
             :class="{ now: bar.now, accepted: bar.accepted }" @click="go(bar.moment)"
             :title="'step ' + bar.step + ': ' + bar.text + ' at ' + bar.entropy.toFixed(3) + ' nats'">
          <span class="cv-column"><span :style="{ height: bar.height + '%' }"></span></span>
          <span class="cv-token">{{ bar.text }}</span><span class="cv-nats">{{ bar.entropy.toFixed(2) }}</span></button>
        </div>
      </div>
    </section>`,

  props: { src: String, running: Boolean, summary: String, stops: Array, recorded: Boolean },

  data() {
    return {
      live: this.running, available: this.recorded, open: false, status: this.running ? "reading the prompt …" : this.summary,
      heat: kept("heat", "no") === "yes", layout: kept("layout", "flow"),
      at: 0, count: 0, where: "", area: "", playing: false, life: null,
    };
  },

  created() {
    // Not reactive: thousands of numbers that only `paint` reads.
    this.film = new Film();
    this.queue = [];
    this.cells = [];
    this.shown = null;
    this.timer = null;
  },

  beforeUnmount() {
    clearTimeout(this.timer);
    this.timer = null;
    this.playing = false;
  },

  watch: {
    summary(text) { if (!this.live) this.status = text; },
  },

  methods: {
    // ---- from the server ----

    push(news) {
      this.film.learn(news);
      for (const opening of news.openings ?? []) {
        this.film.open(opening);
        this.queue.push([opening.canvas, -1]);
      }
      for (const [canvas, frame] of news.frames ?? []) {
        this.film.add(canvas, frame);
        this.queue.push([canvas, this.film.canvases[canvas].frames.length - 1]);
      }
      if (news.rate !== undefined) this.rate = news.rate;
      if (news.over) this.ending = news;
      if (this.timer === null) this.advance();
    },

    advance() {
      if (this.queue.length > MOST_WAITING) this.queue.splice(0, this.queue.length - MOST_WAITING);
      const next = this.queue.shift();
      if (next) {
        this.paint(...next);
        this.tell(...next);
        this.timer = setTimeout(() => this.advance(), Math.max(16, PACE / Math.max(1, this.queue.length)));
        return;
      }
      this.timer = null;
      if (this.ending) this.timer = setTimeout(() => this.finish(), 350);
    },

    finish() {
      this.timer = null;
      this.live = false;
      this.available = this.ending.recorded;
      this.status = this.ending.summary;
      this.film = new Film(); // what was pushed may have left out steps
      this.ending = null;
    },

    tell(number, index) {
      const canvas = this.film.canvases[number], frame = canvas.frames[index];
      const parts = [`canvas ${canvas.index + 1}`];
      if (frame) parts.push(`step ${frame.step} of at most ${canvas.maxSteps}`, `mean entropy ${frame.mean.toFixed(3)}`);
      if (this.rate) parts.push(`${this.rate} tokens/s`);
      this.status = parts.join(" · ");
    },

    // ---- painting ----

    paint(number, index) {
      const canvas = this.film.canvases[number], frame = canvas.frames[index] ?? null;
      const before = index > 0 ? canvas.frames[index - 1] : null;
      const ids = frame ? frame.ids : canvas.ids;
      this.shown = [number, index];
      this.ready(ids.length);
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
        this.set(place, ids[place], look, sure, frame ? frame.e[place] : 255);
        if (sure && this.film.special.has(ids[place]) && this.stops.includes(this.film.texts[ids[place]])) over = true;
      }
    },

    ready(length) {
      const body = this.$refs.body;
      if (this.cells.length === length) return;
      body.replaceChildren();
      this.cells = Array.from({ length }, (_, place) => {
        const element = document.createElement("span");
        element.dataset.place = place;
        body.append(element);
        return { element, text: null, look: null, heat: null, broken: null };
      });
      // Cells are as wide as most of what is spelt: the model's tokens decide.
      const lengths = Object.entries(this.film.texts).filter(([id]) => !this.film.special.has(Number(id)))
        .map(([, text]) => text.trim().length).sort((one, other) => one - other);
      const usual = lengths[Math.floor(0.93 * (lengths.length - 1))] ?? 6;
      body.style.setProperty("--cell", Math.min(9, Math.max(1, usual)));
    },

    set(place, id, look, sure, byte) {
      const cell = this.cells[place];
      const raw = this.film.texts[id] ?? "";
      const special = this.film.special.has(id);
      let text = special ? raw.replace(/[<>|]/g, "") : raw.replaceAll("\ufffd", "·");
      const breaks = !special && raw.includes("\n");
      if (breaks) text = sure && this.layout === "flow" ? text.replaceAll("\n", "↵\n") : text.replaceAll("\n", "↵");
      if (this.layout === "grid") text = text.trim() || (special ? text : "␣");
      if (look.startsWith("fill") && this.layout === "grid") text = "·";
      this.breakAfter(cell, breaks && sure && this.layout === "grid");
      const name = `t ${look}${special ? " mark" : ""}`;
      if (cell.text !== text) cell.element.textContent = cell.text = text;
      if (cell.look !== name) cell.element.className = cell.look = name;
      if (this.heat && cell.heat !== byte) {
        cell.element.style.setProperty("--h", (byte / 255).toFixed(3));
        cell.heat = byte;
      }
    },

    breakAfter(cell, wanted) {
      if (Boolean(cell.broken) === wanted) return;
      if (wanted) cell.element.after((cell.broken = document.createElement("br")));
      else {
        cell.broken.remove();
        cell.broken = null;
      }
    },

    again() {
      for (const cell of this.cells) cell.text = cell.look = cell.heat = null;
      if (this.shown) this.paint(...this.shown);
    },

    setHeat() {
      this.heat = !this.heat;
      keep("heat", this.heat ? "yes" : "no");
      this.again();
    },

    setLayout() {
      this.layout = this.layout === "grid" ? "flow" : "grid";
      keep("layout", this.layout);
      this.again();
    },

    // ---- again, step by step ----

    async toggle() {
      this.open = !this.open;
      this.playing = false;
      if (!this.open) return;
      if (!this.film.canvases.length) {
        const response = await fetch(this.src);
        if (!response.ok) {
          this.status = await response.text();
          this.open = false;
          return;
        }
        this.load(await response.json());
      }
    },

    load(recording) {
      this.film = Film.whole(recording);
      this.moments = this.film.moments();
      this.count = this.moments.length;
      const means = this.moments.map(([canvas, index]) => this.film.canvases[canvas].frames[index].mean);
      const most = Math.max(...means, 0.01), step = 100 / Math.max(means.length - 1, 1);
      this.area = "M0,24" + means.map((mean, index) => `L${(index * step).toFixed(2)},${(23 - 21 * Math.sqrt(mean / most)).toFixed(2)}`).join("") + "L100,24Z";
      this.at = this.count - 1;
      if (this.count) this.seek();
      else this.status = "no step of this answer was recorded";
    },

    seek() {
      const [number, index] = this.moments[this.at];
      const canvas = this.film.canvases[number], frame = canvas.frames[index];
      this.paint(number, index);
      const several = this.film.canvases.length > 1 ? `canvas ${number + 1}/${this.film.canvases.length} · ` : "";
      this.where = `${several}step ${frame.step}/${canvas.frames.length} · entropy ${frame.mean.toFixed(3)} · t ${frame.t.toFixed(2)}`;
      if (this.life) this.look(this.life.place);
    },

    go(moment) {
      this.playing = false;
      this.at = moment;
      this.seek();
    },

    play() {
      this.playing = !this.playing;
      if (!this.playing) return;
      if (this.at >= this.count - 1) this.at = 0;
      else this.at += 1;
      this.seek();
      const pace = Math.min(600, Math.max(60, 6000 / this.count));
      const next = () => {
        if (!this.playing) return;
        if (this.at >= this.count - 1) {
          this.playing = false;
          return;
        }
        this.at += 1;
        this.seek();
        setTimeout(next, pace);
      };
      setTimeout(next, pace);
    },

    // ---- together with other canvases (together.js) ----

    async unfold() {
      while (this.live) { // the last steps are still being shown, or on their way
        if (this.ending) {
          clearTimeout(this.timer);
          this.queue = [];
          this.finish();
        } else await new Promise((resolve) => setTimeout(resolve, 50));
      }
      if (!this.open) await this.toggle();
    },

    seconds() {
      return this.count ? this.frameOf(this.count - 1).seconds : 0;
    },

    walk(share, seconds) {
      // To this share of its steps; or, unless null, to what it showed so many seconds after the request began.
      if (!this.open || !this.count) return;
      let moment = Math.round(share * (this.count - 1));
      if (seconds !== null) {
        moment = 0;
        while (moment + 1 < this.count && this.frameOf(moment + 1).seconds <= seconds) moment += 1;
      }
      if (moment !== this.at) this.go(moment);
    },

    frameOf(moment) {
      const [canvas, index] = this.moments[moment];
      return this.film.canvases[canvas].frames[index];
    },

    placeOf(event) {
      const place = event.target.dataset?.place;
      return place === undefined ? null : Number(place);
    },

    hover(event) {
      const place = this.placeOf(event);
      if (place === null || !this.shown) return;
      const [number, index] = this.shown, canvas = this.film.canvases[number], frame = canvas?.frames[index];
      if (!frame) return;
      event.target.title = `${JSON.stringify(this.film.texts[frame.ids[place]])} · token ${frame.ids[place]} · ${nats(frame.e[place]).toFixed(3)} nats${canvas.pinned.has(place) ? " · pinned" : ""}`;
    },

    choose(event) {
      const place = this.placeOf(event);
      if (place === null || this.live) return;
      this.look(this.life?.place === place ? null : place);
    },

    look(place) {
      for (const cell of this.cells) cell.element.classList.remove("chosen");
      if (place === null) {
        this.life = null;
        return;
      }
      this.cells[place].element.classList.add("chosen");
      const [number, shown] = this.shown, canvas = this.film.canvases[number];
      const first = this.moments.findIndex(([at]) => at === number);
      const bars = canvas.frames.map((frame, index) => {
        const raw = this.film.texts[frame.ids[place]] ?? "", entropy = nats(frame.e[place]);
        return { step: frame.step, entropy, text: raw.replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅",
          height: Math.max(3, 100 * frame.e[place] / 255), accepted: Boolean(frame.f[place] & 1),
          now: index === shown, moment: first + index };
      });
      this.life = { place, bars, pinned: canvas.pinned.has(place) };
    },
  },
};
