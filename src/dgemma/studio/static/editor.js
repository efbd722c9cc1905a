// A canvas that is edited: its tokens are selected, pinned, cleared, typed over; what is to be denoised again is told to
// the server (dgemma.studio.edits says in which words).

import { spelling } from "dgemma-studio/film.js";

export default {
  template: `
    <div class="ce" role="group" aria-label="Edit this canvas" @keydown="key">
      <div class="ce-bar" role="toolbar" aria-label="Selected tokens">
        <button class="cv-button" type="button" @click="set('pin')" :disabled="!count" title="P">Pin</button>
        <button class="cv-button" type="button" @click="set('clear')" :disabled="!count" title="Delete">Clear</button>
        <button class="cv-button" type="button" @click="openType" :disabled="!count" title="T">Type over</button>
        <button class="cv-button" type="button" @click="set('')" :disabled="!count" title="U">Leave</button>
        <button class="cv-button" type="button" @click="undo" :disabled="!past.length" title="Ctrl+Z">Undo</button>
        <button class="cv-button" type="button" @click="all">Select all</button>
        <span class="cv-hint" role="status">{{ told }}</span>
      </div>
      <form v-if="typing" class="ce-type" @submit.prevent="type">
        <textarea ref="words" v-model="words" rows="1" aria-label="Text in place of the selected tokens"
                  @keydown.enter.exact.prevent="type" @keydown.esc.stop="typing = false"></textarea>
        <button class="cv-button ce-main" type="submit">Put in</button>
      </form>
      <div class="cv-body ce-body" ref="body" tabindex="0" role="listbox" aria-multiselectable="true"
           :aria-activedescendant="name(cursor)" @pointerdown="down" @pointermove="move" @pointerup="up"
           aria-label="Tokens. Arrows move, Shift selects, P pins, Delete clears, T types over, U leaves">
        <template v-for="(cell, at) in cells"><span class="t" role="option" :id="name(at)" :data-place="at"
          :aria-selected="chosen[at] === true" :aria-label="cell.label" :class="[cell.look, { selected: chosen[at],
          cursor: at === cursor }]">{{ cell.text }}</span><br v-if="grid && cell.breaks"></template></div>
      <p v-if="note" class="cv-hint ce-note" role="status">{{ note }}</p>
      <p v-if="error" class="ce-error" role="alert">{{ error }}</p>
      <div class="ce-run">
        <label>The rest <select class="cv-button" v-model="rest">
          <option value="stay">stays as it is</option>
          <option value="go_on">goes on from step {{ step }}</option>
          <option value="anew">is drawn anew</option></select></label>
        <label>Seed <input class="cv-button ce-seed" type="number" min="0" step="1" v-model="seed" placeholder="any"></label>
        <span class="cv-space"></span>
        <button class="cv-button" type="button" @click="$emit('close')">Cancel</button>
        <button class="cv-button ce-main" type="button" :disabled="waiting" @click="run">Denoise again</button>
      </div>
    </div>`,

  props: { film: Object, number: Number, index: Number, stops: Array, grid: Boolean },
  emits: ["type", "denoise", "close"],

  data() {
    return { places: [], chosen: [], cursor: 0, anchor: 0, past: [], typing: false, words: "", note: "", error: "",
      rest: "stay", seed: "", waiting: false };
  },

  created() {
    this.begin();
  },

  watch: {
    number() { this.begin(); },
    index(_, before) {
      // Marks hold for another step of the same canvas; what was typed may have moved them.
      if (before !== undefined) this.error = "";
    },
  },

  computed: {
    frame() { return this.film.canvases[this.number].frames[this.index]; },
    step() { return this.frame.step; },
    count() { return this.chosen.filter(Boolean).length; },
    told() {
      const marked = this.places.filter(([, , mark]) => mark).length;
      if (this.count) return `${this.count} ${this.count === 1 ? "token" : "tokens"} selected`;
      return marked ? `${marked} marked` : "Click, drag or Shift+click tokens";
    },
    cells() {
      let over = false;
      return this.places.map(([origin, typed, mark]) => {
        const id = typed ?? this.frame.ids[origin];
        const { text, special, breaks } = spelling(this.film, id, true, this.grid);
        const look = [mark === "pin" ? "pinned" : mark === "clear" ? "cleared" : over ? "fill" : "settled"];
        if (typed !== null) look.push("typed");
        if (special) look.push("mark");
        if (mark !== "clear" && special && this.stops.includes(this.film.texts[id])) over = true;
        const state = { pin: typed === null ? "pinned" : "typed, pinned", clear: "cleared" }[mark] ?? "";
        return { text, breaks, look, label: `${this.film.told(id)}${state ? ` (${state})` : ""}` };
      });
    },
  },

  methods: {
    begin() {
      const { ids } = this.film.canvases[this.number];
      this.places = Array.from(ids, (_, at) => [at, null, ""]);
      this.chosen = [];
      this.past = [];
      this.cursor = this.anchor = 0;
      this.note = this.error = "";
      this.typing = false;
    },

    focus() {
      this.$refs.body.focus({ preventScroll: true });
    },

    name(at) {
      return `ce-${this.$.uid}-${at}`;
    },

    // ---- selecting ----

    select(first, last, more = false) {
      const chosen = more ? [...this.chosen] : [];
      for (let at = Math.min(first, last); at <= Math.max(first, last); at++) chosen[at] = true;
      this.chosen = chosen;
    },

    all() {
      this.select(0, this.places.length - 1);
      this.focus();
    },

    placeAt(event) {
      const under = document.elementFromPoint(event.clientX, event.clientY);
      const place = under?.closest?.(".ce-body [data-place]")?.dataset.place;
      return place === undefined ? null : Number(place);
    },

    down(event) {
      const at = this.placeAt(event);
      if (at === null || event.button) return;
      this.dragging = event.pointerType !== "touch";
      const toggled = event.ctrlKey || event.metaKey || !this.dragging;
      if (event.shiftKey) this.select(this.anchor, at);
      else if (toggled) {
        this.chosen = Object.assign([...this.chosen], { [at]: !this.chosen[at] });
        this.anchor = at;
      } else {
        this.select(at, at);
        this.anchor = at;
      }
      this.cursor = at;
      if (this.dragging) event.preventDefault(); // no selection of text
      this.focus();
    },

    move(event) {
      if (!this.dragging || event.buttons !== 1) return;
      const at = this.placeAt(event);
      if (at === null || at === this.cursor) return;
      this.cursor = at;
      this.select(this.anchor, at);
    },

    up() {
      this.dragging = false;
    },

    key(event) {
      const command = event.ctrlKey || event.metaKey;
      if (event.key === "Escape") {
        event.stopPropagation();
        this.$emit("close");
        return;
      }
      if (event.target !== this.$refs.body) return;
      const last = this.places.length - 1;
      const to = { ArrowLeft: this.cursor - 1, ArrowRight: this.cursor + 1, Home: 0, End: last,
        ArrowUp: this.beside(-1), ArrowDown: this.beside(1) }[event.key];
      const act = { p: () => this.set("pin"), u: () => this.set(""), t: () => this.openType(), Delete: () => this.set("clear"),
        Backspace: () => this.set("clear"), " ": () => this.select(this.cursor, this.cursor, true) }[event.key];
      if (to !== undefined) {
        this.cursor = Math.max(0, Math.min(last, to));
        if (!event.shiftKey) this.anchor = this.cursor;
        this.select(this.anchor, this.cursor);
      } else if (command && event.key === "a") this.all();
      else if (command && event.key === "z") this.undo();
      else if (act && !command) act();
      else return;
      event.preventDefault();
      event.stopPropagation();
    },

    beside(direction) {
      // The token nearest in the line above or below.
      const boxes = [...this.$refs.body.querySelectorAll("[data-place]")].map((one) => one.getBoundingClientRect());
      const here = boxes[this.cursor];
      let best = this.cursor, least = Infinity;
      for (const [at, box] of boxes.entries()) {
        const lines = (box.top - here.top) * direction;
        if (lines < here.height / 2 || !box.width) continue;
        const far = 10 * lines + Math.abs(box.left - here.left);
        if (far < least) [best, least] = [at, far];
      }
      return best;
    },

    // ---- changing ----

    remember() {
      this.past.push(JSON.stringify(this.places));
      this.error = this.note = "";
    },

    set(mark) {
      if (!this.count) return;
      this.remember();
      this.places = this.places.map(([origin, typed, before], at) =>
        this.chosen[at] ? [origin, typed, typed !== null && mark === "" ? before : mark] : [origin, typed, before]);
      this.focus();
    },

    undo() {
      if (!this.past.length) return;
      this.places = JSON.parse(this.past.pop());
      this.note = this.error = "";
      this.chosen = this.chosen.slice(0, this.places.length);
      this.cursor = Math.min(this.cursor, this.places.length - 1);
    },

    span() {
      const at = [...this.chosen.keys()].filter((one) => this.chosen[one]);
      return at.length && at.at(-1) - at[0] + 1 === at.length ? [at[0], at.at(-1)] : null;
    },

    openType() {
      const span = this.span();
      if (!span) {
        this.error = "Select tokens that stand side by side, to type over them.";
        return;
      }
      this.words = this.places.slice(span[0], span[1] + 1)
        .map(([origin, typed]) => this.film.texts[typed ?? this.frame.ids[origin]] ?? "").join("");
      this.typing = true;
      this.$nextTick(() => this.$refs.words.select());
    },

    type() {
      const span = this.span();
      if (span) this.$emit("type", { ...this.where(), first: span[0], last: span[1], text: this.words });
    },

    typed({ places, first, count, note }) {
      this.remember();
      this.places = places;
      this.typing = false;
      this.note = note;
      this.chosen = [];
      if (count) this.select(first, first + count - 1);
      this.cursor = this.anchor = Math.min(first, places.length - 1);
      this.focus();
    },

    where() {
      return { canvas: this.number, step: this.index, places: this.places };
    },

    run() {
      const unmarked = !this.places.some(([, , mark]) => mark);
      if (unmarked && this.count && this.rest === "stay") this.set("clear"); // what is selected is what is meant
      this.waiting = true;
      this.error = "";
      this.$emit("denoise", { ...this.where(), rest: this.rest, seed: this.seed === "" ? null : this.seed });
    },

    refused(why) {
      this.error = why;
      this.waiting = false;
    },
  },
};
