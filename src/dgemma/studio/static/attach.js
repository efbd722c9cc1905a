// Files for a message: chosen, dropped on the chat, or pasted; each is sent to the server, which answers what it is.

export default {
  template: `
    <span class="attach">
      <button class="attach-button" type="button" aria-label="Add pictures or a video" title="Add pictures or a video"
              @click="$refs.files.click()"><i class="q-icon material-icons" aria-hidden="true">attach_file</i></button>
      <input ref="files" type="file" accept="image/*,video/*" multiple hidden @change="choose">
    </span>`,
  mounted() {
    this.area = this.$el.closest(".chat");
    this.listeners = { dragover: this.over, dragleave: this.away, drop: this.drop, paste: this.paste };
    for (const [name, listener] of Object.entries(this.listeners)) this.area.addEventListener(name, listener);
  },
  beforeUnmount() {
    for (const [name, listener] of Object.entries(this.listeners)) this.area.removeEventListener(name, listener);
  },
  methods: {
    choose(event) {
      this.take([...event.target.files]);
      event.target.value = "";
    },
    over(event) {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.area.classList.add("dropping");
    },
    away(event) {
      if (!this.area.contains(event.relatedTarget)) this.area.classList.remove("dropping");
    },
    drop(event) {
      this.area.classList.remove("dropping");
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.take([...event.dataTransfer.files]);
    },
    paste(event) {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.take([...event.clipboardData.files]);
    },
    async take(files) {
      for (const file of files) {
        this.$emit("coming", file.name);
        let told;
        try {
          const response = await fetch(`/media?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
          told = await response.json();
        } catch (error) {
          told = { error: `${file.name}: could not be sent (${error.message})` };
        }
        this.$emit("come", told);
      }
    },
  },
};
